"""JAX reads what it must be told before any test imports it; a target that is absent is skipped."""

import pytest
import targets


@pytest.fixture(scope="session")
def absent() -> dict[str, str | None]:
    """Why a target cannot be compiled for here, None where it can."""
    return {name: targets.missing(name) for name in ("h100", "v5e:2x2", "v5e:2x4")}


@pytest.fixture
def on(absent):
    """The name of a target, or a skip that says why."""

    def given(target: str) -> str:
        if absent[target]:
            pytest.skip(f"no compiler for {target}: {absent[target]}")
        return target

    return given
