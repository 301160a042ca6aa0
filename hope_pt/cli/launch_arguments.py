"""Arguments of `hope launch`; apart from what it does, so that `hope --help` loads argparse alone."""

import argparse


def add_launch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command and its actions; imports nothing that takes time."""
    launch = commands.add_parser("launch", help="plan, check, submit and watch runs on a Slurm cluster (docs/slurm.md)")
    actions = launch.add_subparsers(required=True, metavar="ACTION")
    for name, text in (
        ("plan", "layouts that fit the job's GPUs, days to the end, and the command that submits the fastest"),
        ("dry-run", "everything that is wrong with a job, all of it at once; exit code 2 if anything is"),
        ("submit", "check as dry-run does, then sbatch"),
    ):
        made = actions.add_parser(name, help=text)
        made.add_argument("script", metavar="SCRIPT", help="slurm/hope_1p3b.sh, or hope_1p3b")
        made.add_argument("overrides", metavar="key=value", nargs="*", help="for the trainer, for example name=try2")
        made.add_argument("--config", default="", metavar="FILE", help="instead of the script's own")
        _add_options(made)
        made.set_defaults(module="launch", action=name)
    for name, text in (
        ("status", "where a run is"),
        ("watch", "the same again and again; says when something is wrong"),
        ("cancel", "end all jobs of a run"),
    ):
        made = actions.add_parser(name, help=text)
        made.add_argument("run", metavar="RUN", help="run directory")
        made.set_defaults(module="launch", action=name)
        if name != "cancel":
            made.add_argument("--json", action="store_true", help="for programs")
            made.add_argument(
                "--stall", type=float, default=1800.0, metavar="S", help="seconds of silence that are a problem (default 1800)"
            )
        if name == "watch":
            made.add_argument("--every", type=float, default=30.0, metavar="S", help="seconds between looks (default 30)")
            made.add_argument("--once", action="store_true", help="look once; exit code 2 if something is wrong (for cron)")
    wandb = actions.add_parser("wandb", help="the offline segments of a run in order, and how to send them; or send its metrics.jsonl")
    wandb.add_argument("run", metavar="RUN", help="run directory")
    wandb.add_argument("--upload", action="store_true", help="send the steps of metrics.jsonl that wandb does not have, each once")
    wandb.set_defaults(module="launch", action="wandb")
    preflight = actions.add_parser("preflight", help="inside a job, one process a GPU: are the nodes fit? exit code 3 names bad ones")
    preflight.add_argument("run", metavar="DIRECTORY", help="where the job will write")
    preflight.set_defaults(module="launch", action="preflight")
    _add_small_jobs(actions)


def _add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--cluster", metavar="NAME", help="slurm/clusters/NAME.env (default: HOPE_CLUSTER)")
    made.add_argument("--nodes", metavar="N", help="nodes of the job")
    made.add_argument("--tasks-per-node", metavar="N", help="processes, each with one GPU, on a node")
    made.add_argument("--time", metavar="T", help="time limit, for example 24:00:00")
    made.add_argument("--partition", metavar="NAME")
    made.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other, for example --sbatch=--exclude=n7")


def _add_small_jobs(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    sweep = actions.add_parser("sweep", help="every combination of values as a run of its own, as one job array")
    sweep.add_argument("config", metavar="CONFIG")
    sweep.add_argument("overrides", metavar="key=value,value", nargs="*", help="for example optim.lr=1e-3,3e-3 train.seed=0,1 name=lr")
    evaluate = actions.add_parser("eval", help="`hope eval` of every run as a job")
    evaluate.add_argument("words", metavar="RUN", nargs="+", help="run directories")
    data = actions.add_parser("data", help="a `hope-data` command as a job: hope launch data -- tokenize ...")
    data.add_argument("words", metavar="ARGUMENT", nargs="+")
    for name, made in (("sweep", sweep), ("eval", evaluate), ("data", data)):
        _add_options(made)
        made.add_argument("--parallel", type=int, default=4, metavar="N", help="jobs that run at a time (default 4)")
        made.add_argument("--folder", default="runs/.submitit", metavar="DIR", help="submitit's files and logs (default runs/.submitit)")
        made.add_argument("--print", action="store_true", help="show the batch file and the commands, submit nothing")
        made.set_defaults(module="launch", action=name)
