"""Optuna's own suites of tests for samplers, run on ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, SingleOnlySamplerTestCase

from nacpipe.cache import Cache
from nacpipe.tuning.objective import Objective
from nacpipe.tuning.samplers import GridSampler, LayerwiseSampler
from tests.tuning.test_samplers import grid_space
from tests.tuning.trials import objective_of

Make = Callable[[], BaseSampler]


class TestLayerwiseSampler(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    """Without an objective: parameters are drawn at random."""

    @pytest.fixture
    def sampler(self) -> Make:
        return LayerwiseSampler


class TestLayerwiseSamplerOfAnObjective(SingleOnlySamplerTestCase):
    """The other suite optimizes functions of its own, with other parameters."""

    @pytest.fixture
    def sampler(self, small_cache: Cache) -> Make:
        return lambda: LayerwiseSampler(Objective(small_cache), seed=1)


class TestGridSampler(SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Make:
        return lambda: GridSampler(objective_of(grid_space(2, 2, 2)), seed=1)
