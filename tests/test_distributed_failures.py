"""What becomes of a round whose ranks fail, die, hang or are slow: an error on all that are left, in bounded time."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from flexlora_fast import distributed, storage, work
from flexlora_fast.distributed import parts, spread
from tests import ranks, rounds

SOON = 10  # seconds; nothing here waits for more than a few
LAYERS = [rounds.Layer(f"fc.{i}", 20, 30) for i in range(12)]


def round_of_many_layers(**options):
    clients = [rounds.client(f"c{i}", LAYERS, rank=3, seed=i) for i in range(4)]
    return distributed.aggregate([c.adapter() for c in clients], **{"timeout": 15, **options})


def before(owner, name, hook):
    """Have ``hook`` called before each call of a function, in this process."""
    function = getattr(owner, name)

    def hooked(*args, **options):
        hook()
        return function(*args, **options)

    setattr(owner, name, hooked)


PLACES = {
    "solving": (work.Work, "solve_layer", {}),
    "sending": (parts, "_taken_apart", {}),
    "summing": (distributed.Team, "summed", {"shard": "clients"}),
    "multiplying": (spread.cpu, "materialize", {"shard": "clients", "solver": "factored"}),
    "averaging": (distributed.finishing.extras, "forms", {}),
}


def struck(rank, place, victim, strike, out, options):
    """A round in which the victim is struck at the second call of the place."""
    owner, name, more = PLACES[place]
    calls = []

    def hook():
        calls.append(rank)
        if len(calls) == 2:
            strike()

    if rank == victim:
        before(owner, name, hook)
    try:
        round_of_many_layers(out=out, **more, **options)
    finally:
        assert not out.exists() and not list(out.parent.iterdir())


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def run_out_of_memory():
    raise MemoryError("of a test")


def no_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


# -- death ---


@pytest.mark.parametrize(("place", "victim"), [("solving", 1), ("solving", 0), ("sending", 2), ("multiplying", 1)])
def test_a_killed_rank_is_an_error_on_the_others(tmp_path, place, victim):
    outcomes = ranks.run(3, struck, place, victim, die, tmp_path / "out.safetensors", {})
    assert outcomes[victim].exitcode == -signal.SIGKILL
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert outcome.kind == "DistributedError" and outcome.seconds < SOON, outcome
    if place == "solving":  # its thread's partner notices; amid data the connection does, which has no name
        assert all("rank" in o.text and f"{victim} of 3 was lost" in o.text for o in outcomes if o.error)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rank_that_hangs_counts_as_lost_after_the_timeout(tmp_path):
    outcomes = ranks.run(3, struck, "solving", 2, stop, tmp_path / "out", {"timeout": 2}, patience=5)
    assert outcomes[0].kind == outcomes[1].kind == "DistributedError"
    assert "rank 2 of 3 was lost" in outcomes[0].text
    assert 1.5 < outcomes[0].seconds < SOON and outcomes[1].seconds < SOON


def slow(rank):
    if rank == 1:
        before(work.Work, "solve_layer", lambda: time.sleep(0.7))
    return round_of_many_layers(timeout=1.0) is not None


@pytest.mark.slow
def test_a_slow_rank_is_not_lost():
    """It sleeps for four times what it may be silent."""
    outcomes = ranks.run(2, slow)
    assert [outcome.value for outcome in outcomes] == [True, False]
    assert outcomes[0].seconds > 4


def absent(rank):
    if rank == 1:
        time.sleep(2)
        return None
    return round_of_many_layers(timeout=1.0)


def test_a_rank_that_never_comes():
    outcome = ranks.run(2, absent)[0]
    assert outcome.kind == "DistributedError" and "not all ranks have come" in outcome.text
    assert outcome.seconds < SOON


# -- failure ---


@pytest.mark.parametrize(
    ("place", "victim"),
    [("solving", 1), ("sending", 0), ("sending", 1), ("multiplying", 0), ("multiplying", 1), ("averaging", 1)],
)
def test_what_fails_on_one_rank_is_told_to_all(tmp_path, place, victim):
    one, two, three = ranks.run(3, struck, place, victim, run_out_of_memory, tmp_path / "out", {})
    found = [one, two, three]
    assert found[victim].kind == "MemoryError" and found[victim].text == "of a test"
    for rank, outcome in enumerate(found):
        assert outcome.seconds < SOON
        if rank != victim:
            assert (outcome.kind, outcome.text) == (
                "DistributedError",
                f"rank {victim} failed: MemoryError: of a test",
            )


def full_disk(rank, out):
    calls = []

    def hook():
        calls.append(rank)
        if len(calls) == 8 and rank == 0:  # its own part has 6 layers: this is in the update itself
            no_disk()

    before(storage.UpdateWriter, "add", hook)
    try:
        round_of_many_layers(out=out)
    finally:
        assert not list(out.parent.iterdir())


def test_a_full_disk_of_the_first_rank(tmp_path):
    one, two = ranks.run(2, full_disk, tmp_path / "out.safetensors")
    assert one.kind == "OSError" and "No space left" in one.text
    assert two.kind == "DistributedError" and "rank 0 failed: OSError" in two.text and "No space left" in two.text
    assert max(one.seconds, two.seconds) < SOON


def no_folder(rank):
    return round_of_many_layers(out="/dev/null/out.safetensors")


def test_a_place_that_the_first_rank_cannot_write_to():
    one, two = ranks.run(2, no_folder)
    assert one.kind in ("NotADirectoryError", "FileExistsError")
    assert two.kind == "DistributedError" and two.text.startswith(f"rank 0 failed: {one.kind}")


def stops_early(rank):
    """The first rank fails in its first layer; the other would take a minute for its own."""
    solved = []

    def hook():
        solved.append(rank)
        if rank == 0:
            run_out_of_memory()
        time.sleep(1.0)

    before(work.Work, "solve_layer", hook)
    with pytest.raises((MemoryError, distributed.team.DistributedError)):
        round_of_many_layers()
    return len(solved)


def test_the_others_do_not_finish_what_has_no_use_any_more():
    outcomes = ranks.run(2, stops_early)
    assert outcomes[0].value == 1 and outcomes[1].value < 4
    assert max(outcome.seconds for outcome in outcomes) < SOON


def twice(rank):
    """After a failure that all know of the ranks can go on together."""
    with distributed.Team() as team:
        for _ in range(2):
            with pytest.raises((MemoryError, distributed.team.DistributedError)), team.agreed():
                if rank == 1:
                    run_out_of_memory()
        round_ = distributed.Aggregator(team)
        for i in range(2):
            round_.add(rounds.client(f"c{i}", LAYERS).adapter())
        return (round_.finish() is None) == (rank == 1)


def test_a_team_outlives_an_agreed_failure():
    assert ranks.values(2, twice) == [True, True]
