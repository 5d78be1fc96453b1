"""What all ops share: argument checks, backends, registration, the compiled libraries, Triton."""
