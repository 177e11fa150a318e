"""Operations: torch.library registration, autograd.Function, checks, and the reference implementation."""
