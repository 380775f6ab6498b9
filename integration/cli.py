"""The `farspan` command: one subcommand a task."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farspan import __version__
from farspan.command import floats, integers, mapping, need_matplotlib, run_command, words
from farspan.doctor import add_doctor_command
from farspan.head_profile import add_profile_command
from farspan.plan_command import add_plan_command
from farspan.scheduler.rates import GPUS, LINKS, MEASURED_GPU


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status, as `farspan.command` has them."""
    arguments = make_parser().parse_args(argv)
    return run_command(f"farspan {arguments.command}", lambda: arguments.run(arguments))


class Parser(argparse.ArgumentParser):
    """Of all commands; what a command does not know is refused by that command, with its usage."""

    commands: Mapping[str, argparse.ArgumentParser]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = self.commands[arguments.command]
            is_model = not unknown[0].startswith("-") and "model" in arguments and arguments.model == "needle"
            remedy = f" To name a model: --model {unknown[0]}" if is_model else ""
            command.error(f"unrecognized arguments: {' '.join(unknown)}.{remedy}")
        return arguments


def make_parser() -> argparse.ArgumentParser:
    """The command line: every subcommand sets `run`, a function from the parsed arguments to the exit status."""
    parser = Parser(prog="farspan", description="Long prompts made cheap, as a plugin for vLLM.")
    parser.add_argument("--version", action="version", version=f"farspan {__version__}")
    subcommands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    parser.commands = subcommands.choices
    _add_eval(subcommands)
    _add_report(subcommands)
    _add_audit(subcommands)
    add_plan_command(subcommands)
    add_profile_command(subcommands)
    add_doctor_command(subcommands)
    _add_star(subcommands)
    return parser


def _add_eval(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "eval",
        help="accuracy of attention methods on long-context tasks",
        description="Ask a model generated long-context questions under several attention methods, through vLLM. "
        "Writes OUT/eval.csv, accuracy.png and, with several depths, one heatmap a method and task. A run that was "
        "broken off goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="needle", help="`needle` (bundled), a folder with config.json, or a Hugging Face name")
    add("--tasks", type=words, default="niah_single", help="task names, separated by commas")
    add("--lengths", type=integers, default="1024,4096,8192", help="prompt lengths in tokens")
    add(
        "--depths",
        type=floats,
        default="",
        help="places of the needle, 0 (start) to 1 (end); drawn by seed if empty",
    )
    add(
        "--methods",
        type=words,
        default="dense",
        help="stock, dense, flex, block_sparse, string, or names in --options",
    )
    add(
        "--options",
        type=mapping,
        default="{}",
        metavar="JSON",
        help="farspan options for all methods, or by method name",
    )
    add("--count", type=int, default=20, help="questions for each method, task, length and depth")
    add("--seed", type=int, default=0, help="which questions; the same seed asks the same ones")
    add("--chunk", type=int, help="prompt tokens in one engine step (max_num_batched_tokens)")
    add("--engine-args", type=mapping, default="{}", metavar="JSON", help="further arguments of vllm.LLM")
    add(
        "--questions",
        choices=["auto", "ruler", "words"],
        default="auto",
        help="RULER's form, or the bundled model's words; auto: RULER's for every other model",
    )
    add(
        "--no-chat-template",
        action="store_true",
        help="RULER's form as plain text, also to models that have a template",
    )
    add(
        "--haystack", type=_paths, default="", metavar="FILES", help="text files to hide needles in; else our own prose"
    )
    add("--out", type=Path, default=Path("farspan-eval"), help="folder for the table and the pictures")
    add("--no-plots", action="store_true", help="leave the pictures out")
    parser.set_defaults(run=_run_eval)


def _run_eval(arguments: argparse.Namespace) -> int:
    from farspan.evaluation.evaluate import EvalSettings, run_eval
    from farspan.evaluation.results import CSV_NAME, format_table, remarks

    settings = EvalSettings(
        model=arguments.model,
        tasks=arguments.tasks,
        lengths=arguments.lengths,
        out=arguments.out,
        methods=arguments.methods,
        depths=arguments.depths,
        seed=arguments.seed,
        count=arguments.count,
        chunk=arguments.chunk,
        options=arguments.options,
        engine_args=arguments.engine_args,
        questions=arguments.questions,
        chat_template=not arguments.no_chat_template,
        haystack=arguments.haystack,
    )
    if not arguments.no_plots:
        need_matplotlib("leave the pictures out with --no-plots")
    cells = run_eval(settings)
    files = [settings.out / CSV_NAME]
    if not arguments.no_plots:
        from farspan.evaluation.plots import draw_plots

        files += draw_plots(cells, settings.out)
    print(format_table(cells))
    print("written:", *files)
    for remark in remarks(cells):
        print(f"farspan eval: {remark}", file=sys.stderr)
    return 0


def _add_report(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "report",
        help="pictures of what sparse prefill reads and keeps, as one HTML page",
        description="Draw density, pattern and coverage per layer and head, masks of single heads, accuracy against "
        "density and needle heatmaps. Writes OUT/report.html, its pictures and its tables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="needle", help="`needle` (bundled), a folder with config.json, or a Hugging Face name")
    add("--length", type=int, default=8192, help="prompt tokens")
    add("--gamma", type=float, default=0.95, help="attention mass to keep")
    add("--tau", type=float, default=0.1, help="query-aware below this divergence; of the needle model")
    add("--min-budget", type=int, default=1024, help="fewest KV tokens that a query block reads")
    add("--chunk", type=int, default=0, help="prompt tokens in one engine step; 0 for the whole prompt")
    add("--seed", type=int, default=0, help="which questions")
    add("--count", type=int, default=4, help="questions for each γ of accuracy against density, of other models")
    add("--engine-args", type=mapping, default="{}", metavar="JSON", help="further arguments of vllm.LLM, ditto")
    add("--no-chat-template", action="store_true", help="ask other models in plain text")
    add("--haystack", type=_paths, default="", metavar="FILES", help="text files to hide needles in, ditto")
    add("--from-csv", type=_paths, default="", metavar="FILES", help="draw these tables, separated by commas, instead")
    add("--out", type=Path, default=Path("farspan-report"), help="folder for the page")
    parser.set_defaults(run=_run_report)


def _run_report(arguments: argparse.Namespace) -> int:
    need_matplotlib("write the tables alone, with `farspan eval --no-plots`")
    from farspan.evaluation.report import run_report
    from farspan.evaluation.report_settings import ReportSettings

    settings = ReportSettings(
        out=arguments.out,
        length=arguments.length,
        gamma=arguments.gamma,
        tau=arguments.tau,
        min_budget=arguments.min_budget,
        chunk=arguments.chunk,
        seed=arguments.seed,
        from_csv=arguments.from_csv,
        model=arguments.model,
        count=arguments.count,
        engine_args=arguments.engine_args,
        chat_template=not arguments.no_chat_template,
        haystack=arguments.haystack,
    )
    print("written:", run_report(settings))
    return 0


def _add_audit(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "audit",
        help="which gamma to choose for a model, by texts of your own",
        description="Read texts with a model, densely and by flex with several gammas, through vLLM: what flex reads "
        "and keeps of every head, how far answers drift, and how much faster it is. Prints a table and the gamma that "
        "it recommends; writes OUT/audit.csv, heads.csv, audit.png and coverage-LENGTH.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="`needle` (bundled), a folder with config.json, or a Hugging Face name")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="plain texts like those of your prompts")
    add("--lengths", type=integers, default="8192", help="prompt lengths in tokens, the answer's first one included")
    add("--gammas", type=floats, default="0.9,0.95,0.98", help="attention mass to keep, separated by commas")
    add("--prompts", type=int, default=4, help="most prompts of each length, spread over the texts")
    add("--chunk", type=int, help="prompt tokens in one engine step; 8192, or 2048 on a CPU, if left out")
    add("--options", type=mapping, default="{}", metavar="JSON", help="further options of prefill, such as min_budget")
    add("--engine-args", type=mapping, default="{}", metavar="JSON", help="further arguments of vllm.LLM")
    add("--out", type=Path, default=Path("farspan-audit"), help="folder for the tables and the pictures")
    add("--no-plots", action="store_true", help="leave the pictures out")
    parser.set_defaults(run=_run_audit)


def _run_audit(arguments: argparse.Namespace) -> int:
    from farspan.evaluation.audit import AUDIT_CSV, HEADS_CSV, AuditSettings, run_audit
    from farspan.evaluation.audit_results import format_table, recommend

    settings = AuditSettings(
        model=arguments.model,
        texts=tuple(arguments.text),
        lengths=arguments.lengths,
        gammas=arguments.gammas,
        out=arguments.out,
        prompts=arguments.prompts,
        chunk=arguments.chunk,
        options=arguments.options,
        engine_args=arguments.engine_args,
    )
    if not arguments.no_plots:
        need_matplotlib("leave the pictures out with --no-plots")
    rows, heads = run_audit(settings)
    files = [settings.out / AUDIT_CSV, settings.out / HEADS_CSV]
    if not arguments.no_plots:
        from farspan.evaluation.audit_plots import draw_audit

        files += draw_audit(rows, heads, settings.out)
    print(format_table(rows))
    print(f"Speed-up of the time to the first token: {rows[0].speed_source}.")
    print(recommend(rows)[1])
    print("written:", *files)
    return 0


def _add_star(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "star",
        help="one question about a long context, spread over several hosts (Star Attention)",
        description="Read a context on several hosts at once, each with a GPU (or a share of this CPU), and answer a "
        "query about it. Starts Ray on this machine, or joins the cluster of --address or RAY_ADDRESS. With the "
        "bundled model and no --context, a generated question is asked.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "action",
        nargs="?",
        choices=["ask", "serve", "plan"],
        default="ask",
        help="one question, an OpenAI-like server, or predicted times of more hosts without starting any",
    )
    add("--model", default="needle", help="`needle` (bundled), a folder with config.json, or a Hugging Face name")
    add("--hosts", type=int, default=2, help="engines that share the context, one GPU each or as --engine-args say")
    add("--context", type=Path, help="text file with the context, or context and query around <|query|>")
    add("--query", help="what is asked about it")
    add("--length", type=int, default=2048, help="tokens of the generated question")
    add("--max-tokens", type=int, default=64, help="most new tokens")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--block-len", type=int, help="tokens of a block; a quarter of the context or less if left out")
    add("--anchor-len", type=int, help="tokens of the anchor; a whole block if left out")
    add("--anchor", choices=["auto", "share", "recompute"], default="auto", help="sent, or computed by all")
    add("--visibility", choices=["star", "all"], default="star", help="all: every token sees all before it, exactly")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="for a host that makes no progress")
    add("--start-timeout", type=float, default=900.0, metavar="SECONDS", help="for all hosts to be there")
    add("--graphs", action="store_true", help="decode in CUDA graphs that hold the exchange; a lost host restarts all")
    add("--address", help="of a Ray cluster")
    add("--host", default="127.0.0.1", help="serve: address to listen on")
    add("--port", type=int, default=8000, help="serve: port to listen on")
    add(
        "--strategy",
        choices=["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"],
        default="PACK",
        help="how Ray places hosts over machines",
    )
    add("--gpu", choices=list(GPUS), default=MEASURED_GPU, help="plan: of every host")
    add("--link", choices=list(LINKS), default="nvlink", help="plan: between hosts")
    add("--options", type=mapping, default="{}", metavar="JSON", help="farspan options of every host")
    add("--engine-args", type=mapping, default="{}", metavar="JSON", help="further arguments of vllm.LLM")
    parser.set_defaults(run=lambda arguments: _run_star(arguments, parser))


STAR_PLAN = ("model", "length", "block_len", "gpu", "link")
STAR_UNREAD = {
    "ask": ("host", "port", "gpu", "link"),
    "serve": ("context", "query", "temperature", "gpu", "link"),
}
"""Options without an effect, by action; `plan` reads STAR_PLAN alone."""


def _run_star(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    action, unset = arguments.action, vars(parser.parse_args([arguments.action]))
    for name in STAR_UNREAD.get(action) or (unset.keys() - {"action", "run", *STAR_PLAN}):
        if getattr(arguments, name) != unset[name]:
            parser.error(f"--{name.replace('_', '-')} has no effect with {action}. Leave it out.")
    if arguments.action == "plan":
        from farspan.star.plan import run_star_plan

        return run_star_plan(
            arguments.model, arguments.length, arguments.block_len, arguments.gpu, arguments.link
        )  # fmt: skip
    from farspan.star.command import StarCommand, run_star

    return run_star(
        StarCommand(
            model=arguments.model,
            hosts=arguments.hosts,
            context=arguments.context,
            query=arguments.query,
            length=arguments.length,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            block_len=arguments.block_len,
            anchor_len=arguments.anchor_len,
            anchor=arguments.anchor,
            visibility=arguments.visibility,
            timeout_s=arguments.timeout,
            start_timeout_s=arguments.start_timeout,
            graphs=arguments.graphs,
            address=arguments.address,
            strategy=arguments.strategy,
            options=arguments.options,
            engine=arguments.engine_args,
            listen=(arguments.host, arguments.port) if arguments.action == "serve" else None,
        )
    )


def _paths(text: str) -> tuple[Path, ...]:
    paths = tuple(Path(word) for word in words(text))
    if text and not paths:
        raise argparse.ArgumentTypeError(f"must be files separated by commas, not {text!r}")
    return paths


if __name__ == "__main__":
    sys.exit(main())
