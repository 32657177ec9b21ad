import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.close()
