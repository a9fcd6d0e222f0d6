"""The fixture `model`: a test that has it runs with every model of CONFIGS in its module."""

import pytest

from firth.model.model import LM
from tests.support.models import random_model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        configs = metafunc.module.CONFIGS
        metafunc.parametrize("model", configs.values(), ids=configs, indirect=True)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> LM:
    return random_model(request.param)
