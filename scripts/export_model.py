"""Make a Hugging Face folder of a finished run.

    python scripts/export_model.py runs/RUN.jsonl --to models/muon

RUN is a record, a run id in runs/, or a folder with one run. The new folder has the weights (model.safetensors), the
model's code as the record embeds it, a tokenizer, and a model card. In Python:

    AutoModelForCausalLM.from_pretrained("models/muon", trust_remote_code=True)

Exit codes: 0 done, 2 usage, 3 GPT-2's vocabulary is not to be had, 4 weights or code that cannot be used, 7 disk.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.console import run_script
from aurora.errors import HarnessError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a record, a run id in runs/, or a folder with one run")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="which does not exist yet")
    parser.add_argument("--trust", action="store_true", help="run a model's code that is not this checkout's")
    args = parser.parse_args(argv)

    from scripts.models.export import check_new, export
    from scripts.models.load import find_record, load

    try:
        check_new(args.to)
        export(load(find_record(args.run), args.trust), args.to)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    print(args.to)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
