"""Shared by all tests."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Checkpoints are flushed to the disk, which takes longer than the steps of these runs: not so in memory.
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import pytest
from ranks import Server
from tiny_runs import TINY, TINY_CLASSIFIER

if TYPE_CHECKING:
    from etpp_ssl.recipe import FinetuneRecipe, Recipe
    from etpp_ssl.train.run import Run


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: one of pytest's processes takes it whole, and its runs are made once."""
    items.sort(key=lambda item: "test_fsdp.py" not in item.nodeid)


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder with cifar10/ and imagenette/ that ETPP_DATA points at."""
    folder = os.environ.get("ETPP_DATA")
    if not folder:
        pytest.skip("ETPP_DATA does not point at cifar10/ and imagenette/")
    return Path(folder)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Starts `etpp` in several processes; see `ranks.py`."""
    server = Server(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps precision and device for the whole process; each test chooses its own."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture
def crash_after() -> Callable[[int], AbstractContextManager[None]]:
    """Call it with a step: a run inside ends right after that optimizer step, as a crash would end it."""
    from etpp_ssl.train.loop import on_step_end

    class Crash(Exception):
        pass

    @contextmanager
    def crashing(step: int) -> Iterator[None]:
        def crash(run: Run) -> None:
            if run.state.step == step:
                raise Crash

        on_step_end.append(crash)
        try:
            with pytest.raises(Crash):
                yield
        finally:
            on_step_end.remove(crash)

    return crashing


@pytest.fixture
def terminate_in() -> Callable[[int], AbstractContextManager[None]]:
    """Call it with a step: a run inside gets SIGTERM amid that optimizer step, the 2nd or a later one."""
    from etpp_ssl.train.loop import on_step_end

    @contextmanager
    def terminating(step: int) -> Iterator[None]:
        def arm(run: Run) -> None:
            def terminate(*_: object) -> None:
                handle.remove()
                os.kill(os.getpid(), signal.SIGTERM)

            if run.state.step == step - 1:
                handle = run.model.register_forward_pre_hook(terminate)

        on_step_end.append(arm)
        try:
            yield
        finally:
            on_step_end.remove(arm)

    return terminating


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A run of a second: rectangular synthetic images, three stages, a ViT of one block.

    Call it with overrides as on the command line.
    """
    from etpp_ssl.recipe import Recipe

    def build(*overrides: str) -> Recipe:
        return Recipe.parse(TINY, [f"output={tmp_path / 'run'}", *overrides])

    return build


@pytest.fixture
def tiny_classifier(tmp_path: Path) -> Callable[..., FinetuneRecipe]:
    """A classifier's run of a second: rectangular synthetic images, three stages, a ViT of two blocks.

    Call it with overrides as on the command line.
    """
    from etpp_ssl.recipe import FinetuneRecipe

    def build(*overrides: str) -> FinetuneRecipe:
        return FinetuneRecipe.parse(TINY_CLASSIFIER, [f"output={tmp_path / 'run'}", *overrides])

    return build
