"""Copy a folder between local disk and a bucket: `copy_files.py FROM TO [--only PREFIX]`.

Machines of a training run need not have gcloud. Files whose size is the same at both ends are left
alone, so that a copy that was interrupted goes on; those that `--only` names are always copied.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

from p2r_jax.paths import as_path, copy_file, files_in, is_remote


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--only", default="", help="copy the files whose names start so")
    args = parser.parse_args()
    source, target = as_path(args.source), as_path(args.target)
    files = {name: size for name, size in files_in(source).items() if name.startswith(args.only)}
    if not files:
        raise SystemExit(f"copy_files: no files in {source}")
    there = {} if args.only else files_in(target)

    def copy(name: str) -> None:
        if not is_remote(target):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, target / name)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(copy, [name for name, size in files.items() if there.get(name) != size]))


if __name__ == "__main__":
    main()
