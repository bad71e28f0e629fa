"""What a submitted job runs: ``python -m coordinator.job 3.11 train …`` is ``metafleet train …``, under that Python.

Nothing of Metafleet is imported before that is known: under an older Python it might not even be readable.
"""

import sys


def refuse_other_python(wanted: str) -> None:
    """End the job with one line, and code 2, if this is not Python ``wanted``, MAJOR.MINOR."""
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if found != wanted:
        print(
            f"error: the job runs Python {found} ({sys.executable}) and was submitted from Python {wanted}: submit it "
            f"from Python {found}, or name the cluster's Python {wanted} by --python",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    refuse_other_python(sys.argv[1])
    from coordinator.cli import main

    sys.exit(main(sys.argv[2:]))
