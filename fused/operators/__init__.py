"""Registrations with torch.library, one file an operation: what torch.compile calls."""
