"""Several processes, also as two machines: the run of one process; killed, it continues."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

import musota

SCRIPT = """
import os, signal, sys, musota, torch
from accelerate.tracking import GeneralTracker
from musota.training import trainer

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(512, 8)
        self.output = torch.nn.Linear(8, 512)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, ids):
        return self.output(self.embedding(ids))

class Tracker(GeneralTracker):
    name, requires_logging_directory, tracker = "tracker", False, None

    def log(self, values, step=None, **kwargs):
        with open(os.path.join(folder, "logged.txt"), "a") as file:
            print(step, file=file)

def step(state, batches, train_step=trainer.train_step):
    if killed == [type(state.model).__name__, str(state.step), os.environ.get("RANK")]:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(state, batches)

trainer.train_step = step
text, folder, *killed = sys.argv[1:]
folder = folder.format(rank=os.environ.get("RANK", 0))
corpus = musota.load_corpus(text, 512).limited(3000, 1200)
model = musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=1, dropout=0.0)
training = musota.TrainConfig(2, 3e-3, 5, 5, 3)  # 15 sequences: shares of 8 and 7
options = {"options": musota.RunOptions(micro_batch=3, log_with=Tracker())}
musota.train(musota.Experiment(model, training), corpus, folder + "/mu", **options)
torch.manual_seed(0)
options |= {"training": training, "max_seq_len": 24}
musota.train(Own(), corpus, folder + "/own", **options)
"""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu")
LAUNCHERS = {
    "one": (sys.executable,),
    "torchrun": (*TORCHRUN, "--nproc-per-node", "2", "--standalone"),  # on a free port
    "accelerate": (*ACCELERATE, "--num_processes", "2", "--main_process_port", "0"),
}
NODES = {  # the second machine's rank is added
    "torchrun": (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
                 "--master-port", "PORT", "--node-rank"),
    "accelerate": (*ACCELERATE, "--num_machines", "2", "--num_processes", "2",
                   "--main_process_ip", "127.0.0.1", "--main_process_port", "PORT",
                   "--machine_rank"),
}  # fmt: skip


class Launcher:
    """Runs SCRIPT in several processes."""

    def __init__(self, text_folder, home):
        self.text, self.home, self.script = str(text_folder), home, home / "script.py"
        self.script.write_text(SCRIPT)
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *command):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment, cwd=self.home, **pipes)

    def script_at(self, launcher, folder, *killed):
        process = self.start(*launcher, self.script, self.text, folder, *killed)
        output = process.communicate(timeout=300)[0]
        return process.returncode, output

    def trained(self, name):
        """A folder with the runs of one of LAUNCHERS."""
        folder = self.home / name
        if not folder.exists():
            folder.mkdir()
            status, output = self.script_at(LAUNCHERS[name], folder)
            assert status == 0, output[-3000:]
        return folder


@pytest.fixture(scope="module")
def launcher(text_folder, tmp_path_factory):
    return Launcher(text_folder, tmp_path_factory.mktemp("processes"))


def check_same(one, other, processes=2):
    """Two folders of runs are the same within rounding."""
    for model in ("mu", "own"):
        first, second = musota.Run(one / model), musota.Run(other / model)
        assert (first.config["processes"], second.config["processes"]) == (1, processes)
        assert list(second.steps["loss"]) == pytest.approx(list(first.steps["loss"]), rel=1e-5)
        losses = (list(run.history["valid_loss"]) for run in (first, second))
        assert next(losses) == pytest.approx(next(losses), 1e-4)
        assert len(second.records) == len(first.records) and second.finished


@pytest.mark.parametrize("how", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(launcher, how):
    """Also a module with a layer that it does not use. One of them writes and tracks."""
    one, two = launcher.trained("one"), launcher.trained(how)
    check_same(one, two)
    assert (two / "logged.txt").read_text() == (one / "logged.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "accelerate"])
def test_a_run_of_which_one_process_is_killed_continues(launcher, how):
    undisturbed, folder = launcher.trained(how), launcher.home / f"killed-{how}"
    folder.mkdir()
    for model in ("MuSota", "WrappedModule"):  # in the second epoch
        status, output = launcher.script_at(LAUNCHERS[how], folder, model, "13", "1")
        assert status != 0 and "SIGKILL" in output, output[-3000:]
    shutil.copytree(folder, launcher.home / f"one-continues-{how}")
    status, output = launcher.script_at(LAUNCHERS[how], folder)
    assert status == 0 and output.count("continues after step 9 of 18") == 1, output[-3000:]
    for model in ("mu", "own"):
        run, expected = musota.Run(folder / model), musota.Run(undisturbed / model)
        assert run.summary["weights_sha256"] == expected.summary["weights_sha256"]
        assert list(run.steps["loss"]) == list(expected.steps["loss"])
    status, output = launcher.script_at(LAUNCHERS["one"], launcher.home / f"one-continues-{how}")
    assert status == 0, output[-3000:]
    check_same(launcher.trained("one"), launcher.home / f"one-continues-{how}")


@pytest.mark.slow
@pytest.mark.parametrize("how", NODES)
def test_two_machines_train_as_one(launcher, how):
    """Both are this one."""
    folder, text = launcher.home / f"nodes-{how}", launcher.text
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [part.replace("PORT", port) for part in NODES[how]]
    nodes = [launcher.start(*command, rank, launcher.script, text, folder) for rank in "01"]
    for node in nodes:
        assert node.wait(300) == 0, node.communicate()[0][-3000:]
    check_same(launcher.trained("one"), folder)


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_a_user_facing_error(launcher):
    for rank in "01":
        (launcher.home / f"own-{rank}").mkdir()
    command = LAUNCHERS["torchrun"], launcher.home / "own-{rank}", "MuSota", "13", "1"
    launcher.script_at(*command)
    status, output = launcher.script_at(*command[:2])
    assert status == 1 and "use a folder that all machines share" in output, output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "accelerate"])
def test_the_command_line_with_two_processes(launcher, how):
    folder = launcher.home / f"command-{how}"
    command = ["-m", "musota", "train", "optimized", "--profile", "tiny", "--corpus", launcher.text]
    command += ["--save-to", str(folder), "--set", "epochs=1", "--log-with", "tensorboard"]
    process = launcher.start(*LAUNCHERS[how], *command)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    (run,) = musota.load_runs(next(folder.iterdir()))
    assert run.finished and run.config["processes"] == 2
    assert output.count(": valid PPL ") == 1
    missing = output.count("without the tracker tensorboard: it is not installed")
    assert len([*folder.rglob("events.*")]) + missing == 1  # of one process
