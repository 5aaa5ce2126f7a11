"""The `p2r` command: train, eval, ask, convert, report, and what made the embedded checkpoint."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from p2r_jax.config import DistributedConfig, EvalConfig, MeshConfig, TrainConfig


def main(argv: list[str] | None = None) -> int:
    """Entry point. Errors a person can act on are printed as one line, with exit code 2.

    Exit code 75: a run was asked to end, or lost another process, and goes on when the same command
    is given again.
    """
    parser = ArgumentParser(prog="p2r", description="Perceive-to-Reason in JAX")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (build, _, help_text) in COMMANDS.items():
        subparser = build()
        commands.add_subcommand(name, subparser, help=help_text)
        if name == "data":  # levels of subcommands are added from the top
            _add_data_actions(subparser)
    parsed = parser.parse_args(argv)
    from p2r_jax.data.rows import RowError
    from p2r_jax.data.sources import SourceError
    from p2r_jax.rl.stop import EXIT_RESTART, EXIT_STOPPED, Preempted, RunStopped

    _, run, _ = COMMANDS[parsed.command]
    try:
        run(parsed[parsed.command])
    except Preempted as request:
        print(f"p2r {parsed.command}: {request}", file=sys.stderr)
        return EXIT_RESTART
    except (OSError, RowError, SourceError, ValueError, RunStopped) as error:
        if os.environ.get("P2R_TRACEBACK"):
            raise
        print(f"p2r {parsed.command}: {error}", file=sys.stderr)
        return _alone(EXIT_STOPPED)
    except Exception as error:
        if str(error).startswith("RESOURCE_EXHAUSTED"):
            print(
                f"p2r {parsed.command}: the devices have too little memory: lower "
                "phases[i].microbatch or rollout.slots, or split over more devices (mesh). "
                f"{str(error).splitlines()[0][:300]}",
                file=sys.stderr,
            )
            return _alone(EXIT_STOPPED)
        if not _lost_a_process(error):
            traceback.print_exc()
            return _alone(1)
        print(
            f"p2r {parsed.command}: a computation with the other processes failed, most likely "
            f"because one of them ended: see its output. The same command, given to all of them, "
            f"goes on from the last checkpoint. {str(error).strip().splitlines()[0][:300]}",
            file=sys.stderr,
        )
        return _alone(EXIT_RESTART)
    return 0


def _lost_a_process(error: Exception) -> bool:
    import jax

    # What a program or its inputs are to blame for would fail again.
    own = ("INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION", "NOT_FOUND")
    lost = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(own)
    return lost and jax.process_count() > 1


def _alone(code: int) -> int:
    """End with this exit code; one of several processes at once, so that the others notice.

    An orderly end would wait for all of them, and they may wait for this one.
    """
    import jax

    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


# --- train ------------------------------------------------------------------------------------


def _train_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(TrainConfig, nested_key=None)
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="train nothing: check the data, print schedule and memory, and write what a small "
        "batch of each phase looks like to RUN/dry_run",
    )
    return parser


def _train(args: Namespace) -> None:
    config = _dataclass_of(_train_parser(), args, TrainConfig)
    config.validate()
    start_devices(config.mesh, config.distributed)
    if args.dry_run:
        from p2r_jax.rl.dry_run import dry_run

        dry_run(config)
        return
    from p2r_jax.rl.launch import train

    train(config)


# --- study ------------------------------------------------------------------------------------


def _study_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("file", type=str, help="YAML: base config, arms, seeds, contrasts")
    parser.add_argument("--out", type=str, required=True, help="folder of all runs and the table")
    parser.add_argument("--arms", type=str, default="", help="only these, as a,b; default, all")
    parser.add_argument("--seeds", type=str, default="", help="only these, as 0,1; default, all")
    parser.add_argument(
        "--parallel", type=int, default=1, help="runs at once; 1 where a run needs all devices"
    )
    parser.add_argument(
        "--base", type=str, nargs="+", default=[], help="config files over the study's base"
    )
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="check all configs, print the plan"
    )
    parser.add_argument(
        "--table-only",
        "--table_only",
        action="store_true",
        help="run nothing: table and page anew, of the runs that are finished",
    )
    return parser


def _study(args: Namespace) -> None:
    from p2r_jax.study.run import study

    try:
        seeds = [int(seed) for seed in args.seeds.split(",") if seed]
    except ValueError:
        raise ValueError(f"--seeds must be whole numbers, as 0,1; got {args.seeds!r}") from None
    done = study(
        args.file,
        args.out,
        arms=[name.strip() for name in args.arms.split(",") if name.strip()],
        seeds=seeds,
        parallel=args.parallel,
        dry_run=args.dry_run,
        table_only=args.table_only,
        configs=args.base,
    )
    if not done:
        raise SystemExit(2)


# --- plan -------------------------------------------------------------------------------------


def _plan_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config", help="as of `p2r train`, with its options")
    parser.add_class_arguments(TrainConfig, nested_key=None)
    parser.add_argument(
        "--topology", type=str, required=True, help="v5e:4x4, v5e-16, v5p:2x2x1, v6e-16, h100:8"
    )
    parser.add_argument("--num-slices", "--num_slices", type=int, default=1)
    parser.add_argument("--search", action="store_true", help="rank meshes and microbatches")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--markdown", action="store_true", help="for a README")
    parser.add_argument("--no-cache", "--no_cache", action="store_true", help="compile everything")
    return parser


def _plan(args: Namespace) -> None:
    from p2r_jax.plan.command import plan

    config = _dataclass_of(_plan_parser(), args, TrainConfig)
    output = "json" if args.json else "markdown" if args.markdown else None
    fits = plan(config, args.topology, args.num_slices, output, args.search, not args.no_cache)
    if not fits:
        raise SystemExit(1)


# --- eval -------------------------------------------------------------------------------------


def _eval_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(EvalConfig, nested_key=None)
    return parser


def _eval(args: Namespace) -> None:
    config = _dataclass_of(_eval_parser(), args, EvalConfig)
    start_devices(config.mesh, config.distributed)
    from p2r_jax.evals.launch import run_evaluation

    run_evaluation(config)


# --- ask --------------------------------------------------------------------------------------


def _ask_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("question", type=str, help="the question, in quotes")
    parser.add_argument("--image", type=str, required=True, help="any file Pillow reads")
    parser.add_argument("--model", type=str, default="tiny", help="folder, run, or `tiny`")
    parser.add_argument("--options", type=list[str], default=[], help='e.g. ["red","blue"]')
    parser.add_argument("--prompts", type=str | None, default=None, help="prompt set")
    parser.add_argument("--out", type=str, default="p2r_ask.png", help="picture to write")
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32")
    parser.add_argument("--max_pixels", type=int | None, default=None)
    return parser


def _ask(args: Namespace) -> None:
    start_devices(MeshConfig())
    from p2r_jax.evals.launch import ask

    ask(
        args.model,
        Path(args.image),
        args.question,
        options=args.options,
        prompts=args.prompts,
        out=Path(args.out),
        dtype=args.dtype,
        max_pixels=args.max_pixels,
    )


# --- report, sft, data, prompts ---------------------------------------------------------------


def _report_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("--out", type=str | None, default=None, help="default: RUN/report.html")
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="another run folder: marks what RUN gains and harms against it",
    )
    return parser


def _report(args: Namespace) -> None:
    from p2r_jax.evals.report import write_report

    print(write_report(args.run, args.out, against=args.against))


def _score_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("file", type=str, help="records: OUT/eval/NAME.jsonl")
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="records of another run; a gain is wrong there and right here",
    )
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="folder for JSON and CSV; default: FILE/../score",
    )
    parser.add_argument(
        "--mode", type=str, nargs="+", default=[], help="modes to score; default: all"
    )
    return parser


def _score(args: Namespace) -> None:
    from p2r_jax.evals.score import score_file

    score_file(args.file, args.against, args.out, args.mode)


def _sft_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--out", type=str, required=True, help="checkpoint folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dense_steps",
        type=int | None,
        default=None,
        help="steps of the dense stage; with --tower, more of them",
    )
    parser.add_argument("--steps", type=int | None, default=None, help="joint training steps")
    parser.add_argument(
        "--tower",
        type=str | None,
        default=None,
        help="take the tower of this checkpoint instead of training one from nothing",
    )
    parser.add_argument(
        "--taught_glyphs",
        type=str | None,
        default=None,
        help="characters whose names the reasoner is taught; others are left to reinforcement",
    )
    parser.add_argument("--cpu_devices", type=int | None, default=None)
    return parser


def _sft(args: Namespace) -> None:
    start_devices(MeshConfig(cpu_devices=args.cpu_devices))
    from p2r_jax.sft.launch import make_warm_start

    make_warm_start(
        Path(args.out),
        seed=args.seed,
        dense_steps=args.dense_steps,
        steps=args.steps,
        tower=args.tower,
        taught_glyphs=args.taught_glyphs,
    )


def _convert_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument(
        "direction",
        choices=["from-hf", "to-hf"],
        help="from-hf: safetensors to JAX arrays, which the hosts of a pod read in parts; "
        "to-hf: trained weights to a folder that transformers loads",
    )
    parser.add_argument(
        "source",
        type=str,
        help="from-hf: a Hugging Face folder; to-hf: a run folder, one of its checkpoints, or what "
        "from-hf wrote",
    )
    parser.add_argument("out", type=str, help="folder to write")
    parser.add_argument(
        "--dtype",
        type=Literal["bfloat16", "float32"],
        default="bfloat16",
        help="what the weights are written in, whatever they are read in",
    )
    parser.add_argument(
        "--step",
        type=int | Literal["best", "last"] | None,
        default=None,
        help="to-hf: checkpoint of a run, or `best` by its own evaluations; default, the last",
    )
    parser.add_argument(
        "--files_from",
        type=str | None,
        default=None,
        help="to-hf: folder with config.json and tokenizer; default, what the run started from",
    )
    return parser


def _convert(args: Namespace) -> None:
    import jax

    # Whole tensors need the memory of the host, not that of one chip.
    jax.config.update("jax_platforms", "cpu")
    from p2r_jax.rl.convert import from_hf, to_hf

    if args.direction == "to-hf":
        to_hf(args.source, args.out, args.dtype, args.step, args.files_from)
    elif args.step is not None or args.files_from:
        raise ValueError("--step and --files_from are for to-hf")
    else:
        from_hf(args.source, args.out, args.dtype)


def _prompts_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("action", choices=["import"], help="make a prompt set from FILE")
    parser.add_argument("file", type=str, help="the authors' evaluation/prompt.py")
    parser.add_argument("--out", type=str, required=True, help="YAML file to write")
    parser.add_argument("--newline_after_image", type=bool, default=False)
    return parser


def _prompts(args: Namespace) -> None:
    from p2r_jax.roles.prompts import import_prompts, write_prompt_set

    write_prompt_set(import_prompts(args.file, args.newline_after_image), args.out)
    print(f"wrote {args.out}")


def _data_parser() -> ArgumentParser:
    return ArgumentParser()


def _add_data_actions(parser: ArgumentParser) -> None:
    actions = parser.add_subcommands(required=True, dest="action")

    prepare = ArgumentParser()
    prepare.add_argument(
        "name",
        type=str,
        help="vstar, hrbench_4k, hrbench_8k, mme_realworld, mme_realworld_lite, p2r_10k, or a name "
        "of your own for a .jsonl or .parquet file of rows or a folder with test_questions.jsonl",
    )
    prepare.add_argument("--source", type=str, required=True, help="downloaded folder, or a file")
    prepare.add_argument("--out", type=str, default="data", help="writes OUT/NAME")
    prepare.add_argument("--limit", type=int | None, default=None, help="only the first N records")
    prepare.add_argument(
        "--max_bad_fraction", type=float, default=0.01, help="more bad rows than this are an error"
    )
    actions.add_subcommand("prepare", prepare, help="from downloaded files to a prepared dataset")

    show = ArgumentParser()
    show.add_argument("source", type=str, help="name or path, as for `p2r eval --benchmark`")
    show.add_argument("--folder", type=str, default="data", help="where benchmarks were prepared")
    show.add_argument("--index", type=int | None, default=None, help="only this row, from 0")
    show.add_argument("--limit", type=int, default=5, help="the first N rows")
    show.add_argument(
        "--out", type=str | None, default=None, help="folder for pictures with the true boxes"
    )
    actions.add_subcommand("show", show, help="print rows and draw their true boxes")


def _data(args: Namespace) -> None:
    given = args[args.action]
    if args.action == "prepare":
        _data_prepare(given)
    else:
        _data_show(given)


def _data_prepare(args: Namespace) -> None:
    from p2r_jax.data.prepare import prepare

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, is {args.limit}")
    prepare(
        args.name,
        Path(args.source),
        args.out,
        limit=args.limit,
        max_bad_fraction=args.max_bad_fraction,
    )


def _data_show(args: Namespace) -> None:
    from p2r_jax.data.prepared import BENCHMARKS
    from p2r_jax.data.sources import load_source
    from p2r_jax.evals.show_rows import show_rows

    options = {"folder": args.folder} if args.source in BENCHMARKS else {}
    source = load_source(args.source, **options)
    if args.index is not None and not 0 <= args.index < len(source):
        raise ValueError(f"--index must be 0 to {len(source) - 1}, is {args.index}")
    shown = range(min(args.limit, len(source))) if args.index is None else [args.index]
    show_rows(source, shown, Path(args.out) if args.out else None)


def _probe_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _probe(args: Namespace) -> None:
    from p2r_jax.data.visual_search_probe import run_probe

    for view in ("overview", "crop"):
        result = run_probe(view, steps=args.steps, seed=args.seed)
        print(view, " ".join(f"{k}={v:.3f}" for k, v in result.items() if isinstance(v, float)))


def _scene_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("out", type=str, help="PNG file to write")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--split", type=str, default="test")
    return parser


def _scene(args: Namespace) -> None:
    from PIL import Image

    from p2r_jax.data.sources import load_source

    source = load_source("visual_search", split=args.split)
    if not 0 <= args.index < len(source):
        raise ValueError(f"--index must be 0 to {len(source) - 1}, is {args.index}")
    row = source[args.index]
    Image.fromarray(row.load_image()).save(args.out)
    print(f"{row.question_with_options}\nright answer: {row.answer}\npicture: {args.out}")


COMMANDS: dict[str, tuple[Any, Any, str]] = {
    "train": (_train_parser, _train, "PRA-GRPO training"),
    "eval": (_eval_parser, _eval, "evaluate weights on a benchmark"),
    "ask": (_ask_parser, _ask, "ask one question about one image"),
    "convert": (_convert_parser, _convert, "weights to and from Hugging Face folders"),
    "score": (_score_parser, _score, "score saved answers again, compare runs and modes"),
    "report": (_report_parser, _report, "one HTML page of a run"),
    "study": (_study_parser, _study, "compare ways of training, over several seeds"),
    "plan": (_plan_parser, _plan, "what a run needs of a TPU slice or GPUs, without having them"),
    "sft": (_sft_parser, _sft, "make the embedded tiny checkpoint"),
    "data": (_data_parser, _data, "prepare datasets and look at them"),
    "prompts": (_prompts_parser, _prompts, "import a prompt set"),
    "scene": (_scene_parser, _scene, "draw a scene of the procedural task and ask about it"),
    "probe": (_probe_parser, _probe, "prove that visual_search needs the crop"),
}


def start_devices(mesh: MeshConfig, distributed: DistributedConfig | None = None) -> None:
    """Make virtual CPU devices if asked for, and join the other processes if there are any; must
    run before JAX looks for devices."""
    import jax

    if mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", mesh.cpu_devices)
    if distributed is not None:
        from p2r_jax.parallel import multihost

        multihost.start(distributed)


def _dataclass_of(parser: ArgumentParser, args: Namespace, cls: type) -> Any:
    """The parsed options as the dataclass they describe."""
    names = {field.name for field in dataclasses.fields(cls)}
    init = parser.instantiate_classes(args)
    return cls(**{name: init[name] for name in names})


if __name__ == "__main__":
    sys.exit(main())
