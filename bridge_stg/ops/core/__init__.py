"""What all ops share: checks, backends, registration, the compiled libraries, Triton."""
