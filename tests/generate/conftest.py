import pytest


@pytest.fixture(scope="module", autouse=True)
def small_models_on_one_thread(one_thread: None) -> None:
    pass
