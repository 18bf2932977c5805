"""The command `polyclinic`: its groups come from entry points, and every error ends as two lines and an exit code."""

import logging
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import click
import typer

from polyclinic import __version__
from polyclinic.errors import PolyclinicError

GROUP = "polyclinic.commands"
"""Entry points of this group are functions `register(app)` that add commands; their modules load without torch."""
DEBUG = "POLYCLINIC_DEBUG"


def main() -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; what went wrong goes to stderr. Returns the exit code that polyclinic.errors lists."""
    try:
        command = typer.main.get_command(build())
        code = command.main(list(arguments), prog_name=program(), standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; what was finished is kept", "run the same command again to go on", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: nothing to flush at exit
        return 1
    except click.UsageError as error:
        return _usage(error)
    except PolyclinicError as error:
        return _fail(error.problem, error.fix, error.exit_code)
    except PermissionError as error:
        problem = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        return _fail(problem, "see that you may read and write there, or give another path", 1)
    except Exception as error:
        fix = f"see the traceback with `{program()} --debug ...` or {DEBUG}=1, and report it with this message"
        return _fail(f"unexpected {type(error).__name__}: {error}", fix, 1)


def program() -> str:
    """The command as it was called, for a shell: what to type to call it again from the same folder."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":  # python -m polyclinic
        return f"{_from_here(Path(sys.executable))} -m polyclinic"
    if called.name != "polyclinic" or shutil.which("polyclinic") == str(called):
        return "polyclinic"
    return _from_here(called)


def _from_here(path: Path) -> str:
    """A path, relative if below the working folder, quoted for a shell."""
    below = path.is_absolute() and path.is_relative_to(Path.cwd())
    text = str(path.relative_to(Path.cwd()) if below else path)
    return shlex.quote(text if os.sep in text else f"./{text}")


def _fail(problem: str, fix: str, code: int) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    print(f"error: {problem}\n  fix: {fix}", file=sys.stderr)
    return code


def _usage(error: click.UsageError) -> int:
    """Arguments that make no command; a group named without one shows its help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    path = error.ctx.command_path if error.ctx else program()
    return _fail(error.format_message(), f"`{path} --help` shows what it takes", error.exit_code)


def build() -> typer.Typer:
    """The root application with the commands of every installed package."""
    app = typer.Typer(callback=_root, no_args_is_help=True, rich_markup_mode="rich", add_completion=False)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            entry.load()(app)
        except Exception as error:
            print(
                f"warning: the commands of {entry.name!r} did not load: {type(error).__name__}: {error}\n"
                "  fix: install polyclinic again",
                file=sys.stderr,
            )
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polyclinic {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks and logs; so does {DEBUG}=1.")] = False,
) -> None:
    """Train one medical-image encoder across hospitals whose images never leave them.

    Exit codes: 0 done, 1 failed while running, 2 refused as asked (bad study,
    bad arguments, policy, privacy), 130 interrupted.
    """
    if debug:
        os.environ[DEBUG] = "1"
    if os.environ.get(DEBUG):
        logging.basicConfig(format="%(name)s: %(message)s")
        for package in ("polyclinic", "polyclinic_client", "polyclinic_server", "polyclinic_simulations"):
            logging.getLogger(package).setLevel(logging.DEBUG)


def register(app: typer.Typer) -> None:
    """Add the group `study`."""
    group = typer.Typer(no_args_is_help=True, help="Look at a study file.")
    group.command("show")(show)
    group.command("settings")(settings)
    app.add_typer(group, name="study")


def show(
    file: Annotated[Path, typer.Argument(help="The study file, TOML.")],
    json: Annotated[bool, typer.Option("--json", help="Print the canonical form: what is hashed and sent.")] = False,
    hash: Annotated[bool, typer.Option("--hash", help="Print only the SHA-256 that sites approve.")] = False,
) -> None:
    """Check a study and print it with every default written out.

    The hash does not cover the simulation table: a rehearsed study and the
    deployed one have the same.

    \b
    Examples:
      polyclinic study show study.toml
      polyclinic study show study.toml --hash
      polyclinic study show study.toml --json > canonical.json
    """
    from polyclinic.study import load_study

    study = load_study(file)
    if hash:
        typer.echo(study.hash)
    elif json:
        typer.echo(study.canonical())
    else:
        typer.echo(f"# SHA-256 {study.hash}\n{study.to_toml()}", nl=False)


def settings() -> None:
    """Print every setting that a study may have: its default, its bounds, what it means.

    \b
    Example:
      polyclinic study settings | less
    """
    from polyclinic.reference import reference

    typer.echo(reference(), nl=False)
