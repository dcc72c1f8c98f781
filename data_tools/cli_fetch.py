"""`python -m data_tools fetch`: its options, and what becomes of them."""

import argparse
from pathlib import Path

from data_tools.progress import Progress


def add_arguments(fetch: argparse.ArgumentParser) -> None:
    """The options of `fetch`."""
    fetch.add_argument("dataset", choices=("cc3m", "cc12m", "sbu"))
    fetch.add_argument("--raw", type=Path, required=True, help="folder with the table; pictures go there too")
    fetch.add_argument(
        "--annotations", nargs="+", metavar="FILE", help="tables below --raw; default: all there"
    )
    fetch.add_argument("--workers", type=int, default=64, help="downloads at a time (default 64)")
    fetch.add_argument("--per-host", type=int, default=4, help="of them from one host (default 4)")
    fetch.add_argument(
        "--host-interval",
        type=float,
        default=0.05,
        metavar="SECONDS",
        help="between the starts of two downloads from one host (default 0.05)",
    )
    fetch.add_argument("--timeout", type=float, default=20, help="seconds for a download (default 20)")
    fetch.add_argument("--retries", type=int, default=2, help="after failures that may pass (default 2)")
    fetch.add_argument("--max-mib", type=int, default=32, help="largest picture (default 32)")
    fetch.add_argument(
        "--user-agent", help="what to call ourselves; some hosts ask for an address to write to"
    )
    fetch.add_argument("--retry-all", action="store_true", help="also links that failed for good before")
    fetch.add_argument(
        "--allow-private", action="store_true", help="also connect to addresses that are not public"
    )
    fetch.set_defaults(run=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    from data_tools.fetch.links import TABLES
    from data_tools.fetch.request import Limits
    from data_tools.fetch.run import Settings, fetch_table
    from data_tools.fetch.schedule import Politeness
    from data_tools.lock import folder_lock
    from data_tools.sources import AnnotationError

    if not options.raw.is_dir():
        raise AnnotationError(
            f"--raw {options.raw}: not a folder; expected the table of {options.dataset} in it"
        )
    find, links_of = TABLES[options.dataset]
    tables = [options.raw / name for name in options.annotations or ()] or find(options.raw)
    agent = {} if options.user_agent is None else {"user_agent": options.user_agent}
    limits = Limits(options.timeout, options.max_mib << 20, options.allow_private, **agent)
    settings = Settings(
        limits=limits,
        politeness=Politeness(options.per_host, options.host_interval),
        threads=options.workers,
        retries=options.retries,
        retry_all=options.retry_all,
    )
    progress = Progress()
    with folder_lock(options.raw):
        for table in tables:

            def report(done: int, failed: int, name: str = table.name) -> None:
                progress(name, done, note=f", failed {failed}")

            outcome = fetch_table(table, links_of(table), options.raw, settings, report)
            print(f"{table}: {outcome.links} links, {outcome.there} pictures, {outcome.fetched} fetched now")
            for reason, number in outcome.failed.items():
                print(f"{table}: failed {reason}: {number}")
    return 0
