"""Each kernel compiles for each GPU architecture without spilling, and loads its weights before it waits.

No GPU is needed. By default a selection of the launches of the released models is compiled; with
`scripts/test --all-kernels tests/engine/test_chain_builds.py` each one is, for each architecture.
"""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from chain_builds import SHARED_KB, KernelLaunch, build, recorded, released_launches
from chain_steps import altered

from musicgen_svc.engine.chain import attention, product, tiles

ARCHITECTURES = tuple(SHARED_KB)
SMALL = {"dim": 1024, "heads": 16}
VALUES: dict[str, set[Any]] = {
    "ROWS": {1, 2, 4, 8, 16, 32},
    "INT8": {False, True},
    "FRONT": {"norm", "parts", "plain"},
    "BEHIND": {"store", "gelu", "add"},
}
"""Constants of products, and the values that they have in the steps of the released models."""


@pytest.fixture(autouse=True, scope="module")
def cache_of_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def groups() -> list[list[KernelLaunch]]:
    """The launches of the released models, in groups of the same kernel and row of the table of tiles."""
    found: dict[Any, list[KernelLaunch]] = {}
    for launch in released_launches():
        kernel, constants = launch.kernel.__name__, dict(launch.constants)
        few = constants.get("ROWS", 0) <= tiles.FEW_ROWS
        key = kernel, constants.get("SELF"), constants.get("INPUTS"), constants.get("OUTPUTS"), few
        found.setdefault(key, []).append(launch)
    return list(found.values())


def selection() -> list[tuple[KernelLaunch, int]]:
    """A product of each group for one architecture, and each other kernel for every architecture.

    Of a group, the product is chosen whose values were chosen least before.
    """
    chosen = []
    often: Counter[tuple[str, object]] = Counter()
    turn = cycle(ARCHITECTURES)
    for group in groups():
        if group[0].kernel is product.product:
            launch = min(group, key=lambda each: sum(often[name, each[name]] for name in VALUES))
            often.update((name, launch[name]) for name in VALUES)
            chosen.append((launch, next(turn)))
        else:
            chosen += zip(cycle(group), ARCHITECTURES)
    return chosen


def test_the_table_of_tiles_has_exactly_the_products_of_the_released_models() -> None:
    few = {
        (launch["INPUTS"], launch["OUTPUTS"])
        for launch in released_launches()
        if launch.kernel is product.product and launch["ROWS"] <= tiles.FEW_ROWS
    }
    assert few == tiles.FEW.keys()


def test_the_selection_has_every_row_of_the_table_and_every_kernel_on_every_architecture() -> None:
    chosen = selection()
    kernels = {launch.kernel for launch in released_launches()}
    assert {(launch.kernel, at) for launch, at in chosen} == {
        (k, at) for k in kernels for at in ARCHITECTURES
    }
    products = [launch for launch, _ in chosen if launch.kernel is product.product]
    assert {(launch["INPUTS"], launch["OUTPUTS"]) for launch in products} == tiles.FEW.keys()
    for name, values in VALUES.items():
        assert {launch[name] for launch in products} == values


@pytest.mark.timeout(7200)  # if all are compiled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spilling_and_load_their_weights_before_they_wait(
    architecture: int, all_kernels: bool
) -> None:
    """Within the shared memory of the architecture. The compiler moves no other load before the wait."""
    chosen = released_launches() if all_kernels else [own for own, at in selection() if at == architecture]
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        builds = list(pool.map(lambda launch: build(launch, architecture), chosen))
    print(f"sm_{architecture}: {len(builds)} launches, {time.monotonic() - began:.0f} s")
    faults = [fault for each in builds for fault in each.faults]
    assert not faults, "\n".join(faults)


def early_reads_of_what_a_step_writes(kernels: dict[Any, Any], slots: int) -> list[str]:
    """Which launches of a step read before their wait what an earlier launch of the same step writes.

    Args:
        kernels: replacements of kernels.
        slots: how many slots the step computes.
    """
    step = recorded(slots, layers=2, **SMALL)
    found, written = [], []
    for at, (launch, memory) in enumerate(zip(step.seen, step.memory, strict=True)):
        launch = replace(launch, kernel=kernels.get(launch.kernel, launch.kernel))
        own = build(launch, 90)
        early = frozenset[str]().union(*own.source_early) & memory.keys()
        found += [
            f"launch {at}, {launch.name}, reads {name}"
            for name in sorted(early)
            if any(memory[name].overlaps(each) for each in written)
        ]
        stored = own.stored & memory.keys()
        assert stored, f"{launch.name} writes nothing"
        written += [memory[name] for name in stored]
    return found


@pytest.mark.parametrize("slots", [1, 8])
def test_no_launch_reads_before_its_wait_what_an_earlier_launch_of_the_step_writes(slots: int) -> None:
    assert not early_reads_of_what_a_step_writes({}, slots)


# --- the checks find what they are there for --------------------------------------------------------


WAIT = "    if OVERLAP:\n        gdc_wait()\n"


def first_product() -> KernelLaunch:
    return next(each for each in recorded(1, **SMALL).seen if each.kernel is product.product)


@pytest.mark.parametrize("architecture", [90, 100])
def test_weights_that_are_loaded_after_the_wait_are_found(architecture: int, tmp_path: Path) -> None:
    launch = first_product()
    assert not build(launch, architecture).faults
    load = "    cells = weight +"
    late = altered(product, tmp_path, (load, WAIT + load))
    (fault,) = build(replace(launch, kernel=late.product), architecture).faults
    assert "only 0 bytes are loaded before the wait" in fault


def test_a_tile_that_is_too_large_is_found() -> None:
    launch = next(each for each in recorded(1, dim=2048, heads=32).seen if each.kernel is product.product)
    sizes = {"BLOCK_OUT": 128, "WARPS": 4}
    constants = tuple((name, sizes.get(name, value)) for name, value in launch.constants)
    faults = build(replace(launch, constants=constants, warps=4), 86).faults
    assert len(faults) == 2 and "registers are spilled" in faults[0] and "shared memory" in faults[1]


def test_a_query_that_is_read_before_the_wait_is_found(tmp_path: Path) -> None:
    load = "    scaled_query = tl.load(own).to(tl.float32) * (HEAD**-0.5)\n"
    own = "    own = query"
    early = altered(attention, tmp_path, (f"{WAIT}\n{own}", own), (load, load + WAIT))
    found = early_reads_of_what_a_step_writes({attention.attend: early.attend}, 1)
    assert len(found) == 4 and all("reads query" in each for each in found), "two in each layer"
