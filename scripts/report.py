"""Make the page of a run anew, or compare several on one.

    python scripts/report.py runs/demo-1                               # report.html and loss.png in it
    python scripts/report.py runs/demo-1 runs/demo-2                   # comparison.html here
    python scripts/report.py runs/demo-* --output demo.html

finetune.py makes the page of its run when it ends. This does it at any time, of a run that is still going or
was killed too. The pages need no network: send one to somebody, open it on a phone, print it.
"""

from dataclasses import dataclass
from pathlib import Path

from minqlora.files import write_atomically
from minqlora.report import comparison_page, read_run, run_page, write_report
from options import REQUIRED, option, parse, user_errors


@dataclass
class Config:
    """What can be set."""

    runs: list[Path] = option(
        REQUIRED, "folders of runs: the page of one, or several compared", positional=True
    )
    output: Path | None = option(
        None, "file for the page (default: report.html in the run's folder; of several comparison.html here)"
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if len({run.resolve() for run in self.runs}) < len(self.runs):
            raise ValueError(f"the same run is named twice among {', '.join(map(str, self.runs))}")


def main() -> None:
    """Write the page and say where it is."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        if len(config.runs) == 1 and config.output is None:
            for path in write_report(config.runs[0]):
                print(path)
            return
        records = [read_run(folder) for folder in config.runs]
        text = run_page(records[0]) if len(records) == 1 else comparison_page(records)
        output = config.output or Path("comparison.html")
        if output.is_dir() or not output.parent.is_dir():
            raise ValueError(f"--output {output}: expected a file in a folder that exists")
        write_atomically(output, text.encode())
        print(output)


if __name__ == "__main__":
    main()
