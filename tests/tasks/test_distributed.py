"""Several processes that train one model: the same result, one stop, one loss, one resume."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

import tasks.process_group
from models.durations import Duration
from models.noise import NoiseConfig
from storage.checkpoints import newest_checkpoint
from storage.manifest import read_provenance
from tasks.launching import LocalLaunch, TrainingFailed, launch_worker
from tasks.process_group import ProcessGroup, RanksDiffer, joined_group
from tasks.training import TrainingStopped
from tasks.training_orders import place_order
from tasks.worker import REFUSED, STOPPED, main

SCRIPT = Path(__file__).with_name("train_ranks.py")


@pytest.fixture(autouse=True)
def _as_before():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(command, world_size, **variables):
    """Start the processes as any launcher would: the rendezvous is in the environment."""
    base = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | base | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def start_workers(lab, order, world_size, *options):
    place_order(lab.store, order)
    fingerprint = order.specification.fingerprint
    command = ["-m", "tasks.worker", lab.store.url, fingerprint, "--device", "cpu", *options]
    return start_ranks(command, world_size)


def ended(processes):
    """Wait for all and return their exit codes and what they said."""
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], said


def weights(lab, manifest):
    return load(lab.store.read(manifest.object("model").path))


def provenance_of(lab, order):
    found = read_provenance(lab.store, order.specification.folder)
    assert found is not None
    return found


def newest_step(lab, order):
    """Step of the newest complete checkpoint, None where there is none."""
    found = newest_checkpoint(lab.store, order.specification.fingerprint)
    return None if found is None else found.step


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def until(condition, *, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What one process and two found in the same trainings: {(ranks, rank): found}."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, said = ended(start_ranks([str(SCRIPT), str(folder)], 2))
    assert codes == [0, 0], said
    runpy.run_path(str(SCRIPT))["main"](folder)
    return {key: torch.load(folder / f"{key[0]}-{key[1]}.pt") for key in ((1, 0), (2, 0), (2, 1))}


@pytest.mark.parametrize("case", ["group", "batch", "fixmatch", "swa", "decoupled"])
def test_two_ranks_end_where_one_process_with_the_joint_batch_ends(ranks, case):
    # The tensors hold BatchNorm's running averages and the objective's state, too: ranks that keep
    # their own, or take those of rank 0, differ here (by 0.14 when tried); as do gradients that are
    # not averaged (0.17), or clipped before.
    alone = ranks[1, 0][case]
    for rank in (0, 1):
        together = ranks[2, rank][case]
        assert largest_difference(alone["tensors"], together["tensors"]) <= 1e-9
        assert together["losses"] == pytest.approx(alone["losses"], abs=1e-9)
    moved = largest_difference(
        alone["tensors"], {name: torch.zeros_like(t) for name, t in alone["tensors"].items()}
    )
    assert moved > 0.1
    assert ranks[2, 0][case]["losses"] == ranks[2, 1][case]["losses"]


def test_every_rank_takes_its_share_of_the_statistics_for_the_mean_of_weights(ranks):
    # Twenty steps of training, then the same twenty once more.
    for rank in (0, 1):
        assert ranks[2, rank]["asked"]["swa"] == [(step, rank, 2) for step in range(20)] * 2
    counted = [
        [
            value.item()
            for name, value in ranks[key]["swa"]["tensors"].items()
            if name.startswith("swa.") and name.endswith("num_batches_tracked")
        ]
        for key in ((1, 0), (2, 0), (2, 1))
    ]
    assert set(counted[0]) == {40}
    assert counted[0] == counted[1] == counted[2]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_parts_of_the_ranks_are_disjoint_and_cover_every_step(ranks, norm):
    asked = [ranks[2, rank]["asked"][norm] for rank in (0, 1)]
    assert asked[0] == [(step, 0, 2) for step in range(20)]
    assert asked[1] == [(step, 1, 2) for step in range(20)]


def test_every_rank_has_the_same_ratio_of_labels_and_pseudo_labels(pipeline):
    """And the parts of a step, put together, are the step."""
    from tasks.batches import TrainingBatches

    order = pipeline.student_order(noise=NoiseConfig())
    batches = TrainingBatches(
        pipeline.lab.store,
        order.config,
        labeled=pipeline.lab.labeled.digest,
        class_names=pipeline.lab.class_names,
        selection=pipeline.selection,
        labeling=pipeline.labels,
        stage_stream=5,
        device=torch.device("cpu"),
        max_bad_samples=0,
    )
    try:
        whole = batches.batch(3, 0, 1)
        parts = [batches.batch(3, part, 3) for part in range(3)]
    finally:
        batches.close()
    assert [sizes(part) for part in parts] == [(2, 4)] * 3
    labeled, pseudo = zip(*(part.images.split(sizes(part)) for part in parts), strict=True)
    assert torch.equal(torch.cat([*labeled, *pseudo]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    targets: list = [part.pseudo_targets for part in parts]
    assert whole.pseudo_targets is not None
    assert torch.equal(torch.cat(targets), whole.pseudo_targets)


def sizes(batch):
    return len(batch.labels), len(batch.pseudo_targets)


def test_ranks_agree_on_flags_and_take_rank_0s_values(ranks):
    for rank in (0, 1):
        assert ranks[2, rank]["any"] == [True, False]
        assert ranks[2, rank]["share"] == "of rank 0"
        assert ranks[2, rank]["gather"] == [0, 1]


def test_a_batch_that_cannot_be_shared_out_is_refused_before_any_rank_waits(
    lab, monkeypatch, capsys
):
    order = lab.order()  # 6 labelled images a step
    place_order(lab.store, order)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main([lab.store.url, order.specification.fingerprint, "--device", "cpu"]) == REFUSED
    message = capsys.readouterr().err
    assert "6 labeled images a step" in message
    assert "set batch_size to 4 or 8, or take 3 or 6 parts (ranks)" in message


@pytest.mark.slow
def test_two_workers_commit_one_model_that_one_process_would_have_made(lab, tmp_path):
    order = lab.order(lab.config(accumulation_steps=2))
    assert ended(start_workers(lab, order, 2))[0] == [0, 0]
    together = order.specification.result(lab.store)
    other = lab.in_store(tmp_path / "other")
    alone = other.train(order)
    assert together.fingerprint == alone.fingerprint
    assert largest_difference(weights(lab, together), weights(other, alone)) <= 1e-5
    assert together.counts == alone.counts
    assert provenance_of(lab, order)["processes"] == 2
    assert newest_step(lab, order) is None


@pytest.mark.slow
def test_batchnorm_over_one_joint_batch_is_refused_on_the_cpu(lab):
    order = lab.order(lab.config(accumulation_steps=1))
    codes, said = ended(start_workers(lab, order, 2))
    assert codes == [REFUSED, REFUSED]
    assert all("set accumulation_steps to 2" in text for text in said)


def endless_order(lab):
    """Hours of training, of which tests wait for the first seconds only."""
    return lab.order(
        lab.config(accumulation_steps=2, duration=Duration(steps=10**6), checkpoint_every_steps=20)
    )


def stop_at(step):
    """Ask to stop at the n-th report of an attempt, which is its n-th step in short trainings."""
    seen = iter(range(1, 10**6))
    return lambda: next(seen) == step


@pytest.mark.slow
def test_a_training_goes_on_with_other_numbers_of_processes(lab, tmp_path, monkeypatch):
    order = lab.order(lab.config(accumulation_steps=2, checkpoint_every_steps=5))
    with pytest.raises(TrainingStopped):
        lab.train(order, should_stop=stop_at(3))
    # Of the checkpoints of steps 8 and 13, rank 0 dies while it writes the second one.
    monkeypatch.setenv("SELFTRAIN_CRASH_AT", "checkpoint.between_data_and_record#2")
    codes, said = ended(start_workers(lab, order, 2))
    monkeypatch.undo()
    assert codes[0] == -signal.SIGKILL
    assert codes[1] not in (0, REFUSED, STOPPED), said
    assert newest_step(lab, order) == 8
    resumed = lab.train(order)
    assert provenance_of(lab, order)["resumed_at_step"] == 8
    other = lab.in_store(tmp_path / "other")
    assert largest_difference(weights(lab, resumed), weights(other, other.train(order))) <= 1e-5


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_all_with_one_checkpoint(lab, tmp_path):
    order = endless_order(lab)
    progress = tmp_path / "progress.jsonl"
    workers = start_workers(lab, order, 2, "--progress", str(progress))
    until(progress.exists)
    workers[1].send_signal(signal.SIGTERM)
    codes, said = ended(workers)
    assert codes == [STOPPED, STOPPED], said
    step = newest_step(lab, order)
    for text in said:
        line = text.splitlines()[-1]
        assert line == f"stopped at step {step} of 1000000, checkpoint written"
    attempts = Path(lab.store.url).glob("models/*/attempts/*")
    assert len(list(attempts)) == 1  # rank 1 wrote none


def launch_two(lab, order, on_progress=lambda line: None):
    launch_worker(
        lab.store,
        order.specification.fingerprint,
        device="cpu",
        on_progress=on_progress,
        launch=LocalLaunch(processes=2),
    )


def processes_of(fingerprint):
    """{pid: rank} of the worker processes of a training on this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        variables = dict(item.split(b"=", 1) for item in environment if b"=" in item)
        if fingerprint.encode() in command and b"RANK" in variables and state not in "ZX":
            found[int(folder.name)] = int(variables[b"RANK"])
    return found


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_launch_which_names_it(lab):
    order = endless_order(lab)
    fingerprint = order.specification.fingerprint
    place_order(lab.store, order)
    killed = []

    def kill_rank_1(line):
        if killed or newest_step(lab, order) is None:
            return
        (pid,) = [pid for pid, rank in processes_of(fingerprint).items() if rank == 1]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    with pytest.raises(TrainingFailed, match=r"rank 1 of 2 was lost \(killed, or out of memory\)"):
        launch_two(lab, order, kill_rank_1)
    assert processes_of(fingerprint) == {}
    assert newest_step(lab, order) is not None


@pytest.mark.slow
def test_stopping_a_launch_stops_all_ranks_with_a_checkpoint(lab):
    order = endless_order(lab)
    place_order(lab.store, order)

    class Enough(Exception):
        pass

    def on_progress(line):
        raise Enough

    with pytest.raises(Enough):
        launch_two(lab, order, on_progress)
    assert processes_of(order.specification.fingerprint) == {}
    assert newest_step(lab, order) is not None


@pytest.mark.slow
def test_ranks_that_are_resumed_end_in_the_bytes_of_ranks_that_were_not(lab, tmp_path):
    order = lab.order(lab.config(accumulation_steps=2))
    with pytest.raises(TrainingStopped):
        lab.train(order, should_stop=stop_at(7))
    assert ended(start_workers(lab, order, 2))[0] == [0, 0]
    # One process and two give the same first 7 steps to the bit where the mean is of two parts.
    other = lab.in_store(tmp_path / "other")
    assert ended(start_workers(other, order, 2))[0] == [0, 0]
    resumed, whole = (order.specification.result(one.store) for one in (lab, other))
    assert resumed.object("model").sha256 == whole.object("model").sha256


@pytest.mark.slow
def test_all_ranks_die_with_the_process_that_launched_them(lab, tmp_path):
    order = endless_order(lab)
    fingerprint = order.specification.fingerprint
    place_order(lab.store, order)
    script = (
        "import sys\n"
        "from storage.store import open_store\n"
        "from tasks.launching import LocalLaunch, launch_worker\n"
        "launch_worker(open_store(sys.argv[1]), sys.argv[2], device='cpu',\n"
        "    on_progress=lambda line: print(line['step'], flush=True),\n"
        "    launch=LocalLaunch(processes=2))\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, lab.store.url, fingerprint], stdout=subprocess.PIPE
    )
    try:
        assert launcher.stdout is not None
        assert int(launcher.stdout.readline()) > 0
        assert sorted(processes_of(fingerprint).values()) == [0, 1]
    finally:
        launcher.kill()
        launcher.wait()
    until(lambda: processes_of(fingerprint) == {}, seconds=20)


def start_agents(lab, order, log):
    """Two torchrun agents as on two machines, one rank each, that meet on loopback."""
    worker = ["-m", "tasks.worker", lab.store.url, order.specification.fingerprint]
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([*command, *worker, "--device", "cpu"], env=environment, stderr=log)
        for _ in range(2)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_two_torchrun_agents_one_is_killed_and_the_next_two_end_the_training(lab, tmp_path):
    order = lab.order(
        lab.config(accumulation_steps=2, duration=Duration(steps=400), checkpoint_every_steps=20)
    )
    fingerprint = order.specification.fingerprint
    place_order(lab.store, order)
    with (tmp_path / "log.txt").open("w") as log:
        agents = start_agents(lab, order, log)
        try:
            until(lambda: newest_checkpoint(lab.store, fingerprint, verify=False), seconds=120)
            agents[1].kill()
            # Its rank dies with it, the other rank loses its peer, and the other agent its rank.
            assert agents[0].wait(timeout=120) != 0
            assert agents[1].wait() == -signal.SIGKILL
            until(lambda: processes_of(fingerprint) == {}, seconds=20)
            assert order.specification.result(lab.store) is None
            step = newest_step(lab, order)
            agents = start_agents(lab, order, log)
            assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
        finally:
            for agent in agents:
                agent.kill()
    provenance = provenance_of(lab, order)
    assert (provenance["resumed_at_step"], provenance["processes"]) == (step, 2)
    other = lab.in_store(tmp_path / "other")
    together = weights(lab, order.specification.result(lab.store))
    assert largest_difference(together, weights(other, other.train(order))) <= 1e-2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"torch": "9.9.9"}, r"ranks 0 and 1 differ: torch \S+ and 9\.9\.9; install the same"),
        ({"device": "cuda"}, r"ranks 0 and 1 differ: device cpu and cuda; .*--device cpu or cuda"),
    ],
)
def test_ranks_under_other_versions_or_devices_are_refused(monkeypatch, other, message):
    monkeypatch.setattr(ProcessGroup, "gather", lambda self, facts: [facts, facts | other])
    with pytest.raises(RanksDiffer, match=message):
        tasks.process_group._refuse_differences(ProcessGroup(), torch.device("cpu"))


def test_more_ranks_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="torch sees 2 CUDA devices; start 2 processes here"):
        joined_group("auto").__enter__()


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_a_time_out_of_collectives_that_means_nothing_is_refused(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SELFTRAIN_COLLECTIVE_TIMEOUT_SECONDS", text)
    with pytest.raises(ValueError, match=r"SELFTRAIN_COLLECTIVE_TIMEOUT_SECONDS=.* above 0"):
        joined_group("cpu").__enter__()


@pytest.mark.slow
def test_ranks_that_hang_are_given_up_after_the_time_out(tmp_path):
    script = (
        "import time, sys\n"
        "from tasks.process_group import joined_group\n"
        "with joined_group('cpu') as (group, device):\n"
        "    if group.is_first:\n"
        "        group.any(True)\n"
        "    time.sleep(60)\n"
    )
    ranks = start_ranks(["-c", script], 2, SELFTRAIN_COLLECTIVE_TIMEOUT_SECONDS="3")
    try:
        assert ranks[0].wait(timeout=60) != 0
    finally:
        ranks[1].kill()
        said = [rank.communicate()[1] for rank in ranks]
    assert "Timed out waiting" in said[0]
