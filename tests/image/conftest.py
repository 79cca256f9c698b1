"""The image, built once; see `containers`."""

from collections.abc import Iterator

import pytest

from tests.image import containers


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """Its tag; nothing can be tested where it can't be built."""
    try:
        containers.make_base()
        containers.build()
    except RuntimeError as error:
        pytest.exit(str(error), returncode=1)
    else:
        yield containers.IMAGE
    finally:
        containers.unmount()


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[containers.Container]:
    """The server as `docker run` starts it, with as much memory as docs/operating.md says it needs."""
    with containers.Container("--memory", "2g", "--env", "SPEED_SHUTDOWN_TIMEOUT=60") as running:
        running.wait_ready()
        yield running
