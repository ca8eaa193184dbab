from ep_fixtures import _groups, device, ranks_of  # noqa: F401
