"""The batch protocol on a real Slurm, with a stand-in for the trainer that keeps the trainer's half of it: seconds a scenario."""

import json
import os
import random
import re
import signal
import time

import pytest

pytestmark = pytest.mark.timeout(180)


def seen(run, attempt, rank):
    return json.loads((run.path / "slurm" / f"seen-{attempt}-{rank}.json").read_text())


def test_a_job_of_two_nodes_runs_to_its_end(run):
    job = run.submit("optim.lr=1e-3", "data.path=some where/else")
    assert run.wait(job) == "COMPLETED", run.log
    assert run.actions == ["done"] and run.cluster.job(job)["ExitCode"] == "0:0"
    ranks = [seen(run, 1, rank) for rank in range(4)]
    assert [rank["host"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    expected = ["train", "configs/hope_1p3b.toml", "optim.lr=1e-3", "data.path=some where/else", "name=run", f"out={run.path.parent}"]
    assert all(rank["argv"] == expected for rank in ranks)
    for key in ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "HOPE_RUN", "OMP_NUM_THREADS"):
        assert len({rank["environment"][key] for rank in ranks}) == 1
    assert ranks[3]["environment"]["MASTER_ADDR"] == "n1" and ranks[3]["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "rank 3 of 4: n2, local rank 1, GPU 1 of '0,1'" in run.log
    assert not (run.path / "slurm" / "owner").exists()


def test_a_killed_rank_is_restarted_and_the_run_is_finished(run):
    job = run.submit(FAKE_STEPS="60")
    run.wait_for_step(10)
    os.kill(random.choice(run.processes()), signal.SIGKILL)
    run.wait_for_log("attempt 2 from step")
    assert run.wait(job) == "COMPLETED", run.log
    assert run.actions == ["requeue", "done"]
    first = int(re.search(r"start 2 .* step=(\d+)", "\n".join(run.attempts)).group(1))
    assert first >= 10
    assert seen(run, 1, 0)["environment"]["MASTER_PORT"] != seen(run, 2, 0)["environment"]["MASTER_PORT"]


def test_a_crash_that_repeats_ends_after_three_attempts(run):
    job = run.submit(FAKE_FAIL_ATTEMPTS="99", FAKE_FAIL_RANK="2")
    assert run.wait(job, seconds=90) == "FAILED"
    assert run.actions == ["requeue", "requeue", "give-up"] and run.cluster.job(job)["ExitCode"] == "93:0"
    assert run.cluster.queue() == []
    again = run.submit(FAKE_FAIL_ATTEMPTS="4")
    run.wait(again)
    assert run.actions[3:] == ["requeue", "done"], "a new submission is a person's decision and has all its attempts"


@pytest.mark.parametrize(("code", "action"), [("2", "user"), ("93", "never")])
def test_what_a_restart_cannot_mend_is_not_restarted(run, code, action):
    job = run.submit(FAKE_FAIL_ATTEMPTS="99", FAKE_FAIL_CODE=code, FAKE_FAIL_RANK="3")
    assert run.wait(job) == "FAILED"
    assert run.actions == [action] and run.cluster.job(job)["ExitCode"] == f"{code}:0"


def test_a_cancelled_job_stays_cancelled(run):
    job = run.submit(FAKE_STEPS="1000")
    run.wait_for_step(3)
    run.cluster.run("scancel", job)
    assert run.wait(job) == "CANCELLED"
    time.sleep(8)
    assert run.cluster.queue() == [] and run.actions in ([], ["leave"]), run.log


@pytest.mark.slow
def test_a_cancelled_trainer_that_dies_of_the_signal_stays_cancelled(run):
    job = run.submit(FAKE_STEPS="1000", FAKE_AGREES="0")
    run.wait_for_step(3)
    run.cluster.run("scancel", job)
    assert run.wait(job) == "CANCELLED"
    time.sleep(8)
    assert run.cluster.queue() == [] and run.actions in ([], ["leave"]), run.log


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_cancels_at_random_moments_stay_cancelled(run):
    draw = random.Random(0)
    for _ in range(50):
        job = run.submit(FAKE_STEPS="1000", FAKE_AGREES=draw.choice("01"))
        time.sleep(draw.uniform(0, 3))
        run.cluster.run("scancel", job)
        assert run.wait(job) == "CANCELLED"
        assert run.cluster.job(job)["Restarts"] == "0"
    time.sleep(8)
    assert run.cluster.queue() == []


def test_a_second_job_of_the_same_run_is_refused_and_disturbs_nothing(run):
    first = run.submit(FAKE_STEPS="80", shape={"nodes": 1})
    run.wait_for_step(3)
    second = run.submit(shape={"nodes": 1})
    assert run.wait(second) == "FAILED" and run.cluster.job(second)["ExitCode"] == "2:0"
    assert f"run run belongs to job {first}, which still exists" in run.log
    assert run.wait(first) == "COMPLETED" and run.actions == ["done"]


def test_a_run_whose_owner_is_gone_is_taken_over(run):
    (run.path / "slurm").mkdir(parents=True)
    (run.path / "slurm" / "owner").write_text("999999\n")
    assert run.wait(run.submit(shape={"nodes": 1, "tasks": 1})) == "COMPLETED", run.log


def test_a_signal_before_the_time_limit_saves_and_requeues(run):
    """sbatch's --signal=B:USR1@300 reaches the batch shell; scancel sends the same signal without the wait."""
    job = run.submit(FAKE_STEPS="50")
    run.wait_for_step(5)
    run.cluster.run("scancel", "--batch", "--signal=USR1", job)
    run.wait_for_log("attempt 2 from step")
    assert run.wait(job) == "COMPLETED", run.log
    assert run.actions == ["requeue", "done"] and run.cluster.job(job)["Restarts"] == "1"
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    # The stand-in commits the step it stops at without a metrics line; nothing else is lost or repeated.
    assert len(steps) == len(set(steps)) >= 49


@pytest.mark.slow
def test_a_job_that_is_always_stopped_before_its_first_step_does_not_restart_for_ever(run):
    job = run.submit(FAKE_STEPS="50", FAKE_PERIOD="30", HOPE_MAX_FRUITLESS="2", FAKE_AGREES="0")
    for attempt in (1, 2):
        run.wait_for_log(f"attempt {attempt} from step 0")
        time.sleep(1.5)
        run.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert run.wait(job) == "FAILED"
    assert run.actions == ["requeue", "give-up"]


@pytest.mark.slow
def test_a_requeue_by_an_administrator_is_left_to_slurm(run):
    job = run.submit(FAKE_STEPS="40")
    run.wait_for_step(5)
    run.cluster.run("scontrol", "requeue", job)
    run.wait_for_log("attempt 2 from step")
    assert run.wait(job) == "COMPLETED", run.log
    assert run.cluster.job(job)["Restarts"] == "1" and "requeue" not in run.actions


@pytest.mark.slow
def test_a_preempted_job_saves_and_comes_back(run):
    job = run.submit(FAKE_STEPS="60", shape={"nodes": 3, "tasks": 1})
    run.wait_for_step(5)
    whole = ["--nodes=3", "--ntasks-per-node=1", "--gres=gpu:4", "--mem=0", "--exclusive", "--output=/dev/null"]
    high = run.cluster.run("sbatch", "--parsable", "-p", "high", *whole, "--wrap", "srun sleep 1").stdout.strip()
    run.wait_for_log("attempt 2 from step", seconds=90)
    assert run.cluster.job(high)["JobState"] == "COMPLETED"
    assert run.wait(job) == "COMPLETED", run.log
    assert run.actions == ["preempted", "done"]
    assert int(re.search(r"start 2 .* step=(\d+)", "\n".join(run.attempts)).group(1)) >= 5


@pytest.mark.parametrize("restarts", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "each restarted once"])
def test_an_array_is_four_runs(run, tmp_path, restarts):
    (tmp_path / "lines.txt").write_text("".join(f"optim.lr={lr} train.seed=1\n\n" for lr in ("1e-3", "2e-3", "3e-3", "4e-3")))
    arguments = ("configs/hope_tiny.toml", str(tmp_path / "lines.txt"), "train.steps=3")
    settings = {"FAKE_FAIL_ATTEMPTS": "1"} if restarts else {}
    run.submit(*arguments, script="sweep.sh", options=("--array=0-3%2",), shape={"nodes": 1, "tasks": 1}, **settings)
    run.wait_for_queue(seconds=90)
    for index, lr in enumerate(("1e-3", "2e-3", "3e-3", "4e-3")):
        status = json.loads((tmp_path / f"run-{index}" / "status.json").read_text())
        argv = json.loads((tmp_path / f"run-{index}" / "slurm" / f"seen-{1 + restarts}-0.json").read_text())["argv"]
        assert status["state"] == "done" and argv[1:5] == ["configs/hope_tiny.toml", "train.steps=3", f"optim.lr={lr}", "train.seed=1"]


def test_a_chain_runs_one_link_at_a_time_and_ends_with_the_run(run):
    words = [*run.options(nodes=1, tasks=1), run.root / "slurm" / "hope_760m.sh", f"name={run.path.name}", f"out={run.path.parent}"]
    settings = {"HOPE_COMMAND": run.command, "HOPE_PREFLIGHT": "0", "FAKE_STEPS": "40"}
    said = run.cluster.run(run.root / "slurm" / "chain.sh", 4, *words, **settings).stdout.split()
    first = said[0]
    run.wait_for_step(5)
    run.cluster.run("scancel", "--batch", "--signal=USR1", first)
    run.wait_for_log("the links of chain")
    run.wait_for_queue()
    assert run.actions == ["requeue", "done"]
    assert [run.cluster.job(number)["JobState"] for number in said[:4]] == ["FAILED", "COMPLETED", "CANCELLED", "CANCELLED"]


@pytest.mark.slow
def test_the_next_links_of_a_chain_leave_out_a_bad_node(run):
    words = [*run.options(nodes=2, tasks=1), run.root / "slurm" / "hope_760m.sh", f"name={run.path.name}", f"out={run.path.parent}"]
    settings = {"HOPE_COMMAND": run.command, "HOPE_CLUSTER": "onebox", "FAKE_BAD_NODES": "n1"}
    said = run.cluster.run(run.root / "slurm" / "chain.sh", 3, *words, **settings).stdout.split()
    run.wait_for_queue()
    assert run.actions == ["exclude", "done"], run.log
    assert {seen(run, 2, rank)["host"] for rank in range(2)} == {"n2", "n3"}
    assert [run.cluster.job(number)["JobState"] for number in said[:3]] == ["FAILED", "COMPLETED", "CANCELLED"]


@pytest.mark.parametrize(("script", "said"), [("eval.sh", "eval runs/x --step 3"), ("preflight.sh", "launch preflight runs/x")])
def test_services_run_in_every_task(run, script, said):
    words = said.replace("launch preflight", "").replace("eval", "").split()
    settings = {"HOPE_COMMAND": "/bin/echo", "HOPE_CLUSTER": "onebox"}
    job = run.cluster.run("sbatch", "--parsable", *run.options(), run.root / "slurm" / script, *words, **settings).stdout.strip()
    assert run.wait(job) == "COMPLETED", run.log
    assert sorted(line for line in run.log.splitlines() if line.endswith(said)) == [f"{rank}: {said}" for rank in range(4)]


def test_a_bad_node_is_left_out(run):
    job = run.submit(HOPE_PREFLIGHT="1", FAKE_BAD_NODES="n1")
    assert run.wait(job) == "COMPLETED", run.log
    assert run.actions == ["exclude", "done"]
    assert [seen(run, 2, rank)["host"] for rank in range(4)] == ["n2", "n2", "n3", "n3"]


@pytest.mark.slow
def test_more_than_two_bad_starts_end_the_job(run):
    job = run.submit(HOPE_PREFLIGHT="1", FAKE_BAD_NODES="n1,n2,n3", shape={"nodes": 1})
    assert run.wait(job) == "FAILED", run.log
    assert run.actions == ["exclude", "exclude", "nodes"] and run.cluster.job(job)["ExitCode"] == "93:0"


def test_a_cluster_that_forbids_requeue_is_named(run):
    job = run.submit(options=("--no-requeue",), shape={"nodes": 1, "tasks": 1}, FAKE_FAIL_ATTEMPTS="1")
    assert run.wait(job) == "FAILED" and run.cluster.job(job)["ExitCode"] == "1:0"
    assert "use slurm/chain.sh" in run.log and not (run.path / "slurm" / "owner").exists()
    assert run.wait(run.submit(shape={"nodes": 1, "tasks": 1})) == "COMPLETED", run.log


def test_one_visible_gpu_for_each_task_is_the_device_of_that_task(run):
    job = run.submit(options=("--gres=none", "--gpus-per-task=1"))
    assert run.wait(job) == "COMPLETED", run.log
    found = {
        (one["environment"]["CUDA_VISIBLE_DEVICES"], one["environment"]["SLURM_LOCALID"]) for one in (seen(run, 1, r) for r in range(4))
    }
    assert found == {("0", "0"), ("1", "0")}


def test_fewer_gpus_than_tasks_are_refused(run):
    job = run.submit(options=("--gres=gpu:2", "--ntasks-per-node=3"), shape={"nodes": 1})
    assert run.wait(job) == "FAILED" and "ask for one GPU a task" in run.log
    assert run.actions == ["user"]


@pytest.mark.slow
def test_a_dead_node_is_replaced(run):
    """kill -9 of a node's slurmd and of everything it runs; SlurmdTimeout is 10 s here, 300 s by default."""
    job = run.submit(FAKE_STEPS="60")
    run.wait_for_step(5)
    run.lose_node("n2")
    run.wait_for_log("attempt 2 from step", seconds=90)
    assert run.wait(job, seconds=90) == "COMPLETED", run.log
    assert {seen(run, 2, rank)["host"] for rank in range(4)} == {"n1", "n3"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("signal", "agrees", "reason"), [("USR1@30", "1", "usr1"), ("URG@1", "0", ""), ("URG@1", "never", "")])
def test_a_job_comes_back_after_its_time_limit(run, signal, agrees, reason):
    """A real limit. In the first case the ranks save before it; in the others nobody is warned, and they end by TERM, or by KILL."""
    options = ("--time=1", f"--signal=B:{signal}")
    job = run.submit(options=options, FAKE_STEPS="1500", FAKE_AGREES=agrees)
    run.wait_for_log("attempt 2 from step", seconds=150)
    assert run.actions == ["requeue"], run.log
    start = re.search(r"start 2 .* step=(\d+)", "\n".join(run.attempts))
    assert start and int(start[1]) > 0
    assert ("TIME LIMIT" in run.log) == (reason == "") and run.cluster.job(job)["Restarts"] == "1"


@pytest.mark.slow
def test_a_crash_while_the_controller_is_away_is_restarted_when_it_is_back(run):
    job = run.submit(FAKE_STEPS="120", FAKE_CRASH_AT="90", shape={"nodes": 1})
    run.wait_for_step(80)
    run.cluster.kill_daemon("slurmctld")
    time.sleep(25)
    assert run.actions == []
    run.cluster.start_controller()
    run.wait_for_log("attempt 2 from step 90", seconds=90)
    assert run.wait(job) == "COMPLETED", run.log
    assert run.actions == ["requeue", "done"]


@pytest.mark.slow
def test_a_job_that_was_cancelled_a_moment_ago_is_not_requeued(run):
    """Of a job that ends, `scontrol requeue` makes a new one; with the word that the batch script uses it does not."""
    wrapped = "trap : TERM; for i in $(seq 60); do sleep 0.2; done"
    job = run.cluster.run("sbatch", "--parsable", *run.options(nodes=1, tasks=1), "--requeue", f"--wrap={wrapped}").stdout.strip()
    time.sleep(1)
    run.cluster.run("scancel", "--full", job)
    run.cluster.run("scontrol", "requeue", "incomplete", job, check=False)
    assert run.wait(job) == "CANCELLED" and run.cluster.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_restart_of_the_controller_is_not_noticed(run):
    job = run.submit(FAKE_STEPS="150")
    # A job that was submitted in the last seconds is not in the controller's files yet.
    run.wait_for_step(90)
    run.cluster.kill_daemon("slurmctld")
    time.sleep(2)
    run.cluster.start_controller()
    assert run.wait(job) == "COMPLETED", run.log
    assert run.actions == ["done"]
