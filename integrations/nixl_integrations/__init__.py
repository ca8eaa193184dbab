"""Adapters and use cases over `nixl` and `nixl_ep`; each module stands alone."""
