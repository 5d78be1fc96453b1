"""`attend_memory` and `share_memory`."""
