"""Python imports this when it starts, in every process that tests start."""

import sdpa_guard  # noqa: F401
