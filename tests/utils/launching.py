"""
Starts scripts on two real processes, and gathers what they wrote.

`accelerate launch` imports torch and Transformers three times before a run of two ranks begins, which takes longer than the run.
Here the ranks are forked from one process that has imported both, with the environment that `accelerate launch` gives them.
"""

import faulthandler
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
RECIPES = TESTS.parent / "examples" / "accelerate_configs"
STAGES = [[5, 2], [9, 3], [13, 5]]
# What the scripts import.
PRELOADED = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.resnet.modeling_resnet",
    "smartfrz_hf.callback",
    "smartfrz_hf.trainer",
]
LONGEST = 300  # seconds that a run may take
GRACE = 40  # seconds in which the other ranks end once one has failed; they wait for 20 or 30 seconds for it


def launch(folder, *words, ranks=2, recipe="ddp_cpu", script="run.py"):
    """
    Run a script on some ranks.

    A run that a native crash of a rank has ended (SIGSEGV, SIGABRT) is repeated once, with a warning and the stacks of its
    threads. It was seen in one run of some hundreds, with torch 2.13 and FSDP2: gloo's own thread, `gloo_tcp_loop`, crashed in
    `malloc` of the C library, whose list of free chunks was damaged. 110 repetitions, half of them with freed
    memory overwritten, have not shown it again, and its cause is not known. An error in Python that comes first, such as a failed assertion, is never repeated.

    Returns:
        `subprocess.CompletedProcess`: the exit code of the first rank that has failed, or 0, and what all ranks wrote. A rank that
        a signal has ended is named there.
    """
    folder.mkdir(exist_ok=True)
    there = set(folder.iterdir())
    done = launch_once(folder, *words, ranks=ranks, recipe=recipe, script=script)
    if done.returncode in (-signal.SIGSEGV, -signal.SIGABRT):
        warnings.warn(f"A rank crashed natively, and the run is repeated:\n{done.stderr}", stacklevel=2)
        for path in set(folder.iterdir()) - there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        done = launch_once(folder, *words, ranks=ranks, recipe=recipe, script=script)
    return done


def launch_once(folder, *words, ranks, recipe, script):
    words = [str(TESTS / "distributed" / script), str(folder), *words, f"--world_size={ranks}"]
    # Its workers find each other there, as those of torchrun do.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    logs = [folder.parent / f"{folder.name}-{time.monotonic_ns()}-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        log.touch()
        environment = {} if ranks == 1 else environment_of(recipe) | places(rank, ranks, store.port)
        processes.append(context.Process(target=be_a_rank, args=(words, environment, log)))
        processes[-1].start()
    failed = wait(processes)
    codes = [process.exitcode for process in processes]
    said = [log.read_text(errors="replace") for log in logs]
    said += [f"Rank {rank} was ended by {signal.Signals(-code).name}." for rank, code in enumerate(codes) if code < 0]
    return subprocess.CompletedProcess(words, failed, "", "\n".join(said))


def launch_by_command(folder, *words, recipe):
    """The same by `accelerate launch` itself."""
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{recipe}.yaml")]
    command = [sys.executable, *launcher, str(TESTS / "distributed" / "run.py"), str(folder), *words]
    paths = os.pathsep.join(map(str, (TESTS, TESTS / "utils", TESTS.parent)))
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=LONGEST
    )


def environment_of(recipe):
    """What `accelerate launch` puts into the environment of a rank."""
    options, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(RECIPES / f"{recipe}.yaml"), "script"])
    )
    names = ("ACCELERATE_", "FSDP_")
    return {key: value for key, value in prepare_multi_gpu_env(options).items() if key.startswith(names)}


def places(rank, ranks, port):
    """What torchrun puts there."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def be_a_rank(words, environment, log):
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    sys.argv = words
    sys.path[:0] = [str(TESTS / "distributed"), str(TESTS / "utils")]
    runpy.run_path(words[0], run_name="__main__")


def wait(processes):
    """
    For all ranks. Those that still wait for one that has failed are ended.

    Returns:
        `int`: the exit code of the first that has failed, or 0.
    """
    failed, running, end = 0, list(processes), time.monotonic() + LONGEST
    while running and time.monotonic() < end:
        connection.wait([process.sentinel for process in running], max(0, end - time.monotonic()))
        codes = sorted(process.exitcode for process in running if process.exitcode is not None)
        running = [process for process in running if process.exitcode is None]
        if not failed and any(codes):
            failed, end = next(filter(None, codes)), min(end, time.monotonic() + GRACE)
    for process in running:
        process.kill()
    for process in processes:
        process.join()
    return failed or next((process.exitcode for process in running), 0)


def results(folder, *words, ranks=2, **options):
    """What each rank of a run said at its end, and the weights, which are the same on all ranks."""
    done = launch(folder, *words, ranks=ranks, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"end-{rank}.json").read_text()) for rank in range(ranks)]
    assert [part["world_size"] for part in found] == [ranks] * ranks
    weights = [load_file(folder / f"end-{rank}.safetensors") for rank in range(ranks)]
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items()), "ranks drifted apart"
    return found, weights[0]
