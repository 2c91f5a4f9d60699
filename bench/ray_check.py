"""Checks `stagedspec.ray.Complete` on a local Ray with two actors: the output of one process, also if an actor dies.

    pip install '.[ray]' && python bench/ray_check.py

No test runs it: Ray and what it needs are half a gigabyte. Exit status 1 if a completion differs.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import ray

import stagedspec
from stagedspec.ray import Complete
from stagedspec.tuning.prompts import read_prompts

PROMPTS = read_prompts(Path(__file__).with_name("prompts.jsonl"))[:48]
OPTIONS = {"max_new_tokens": 32, "do_sample": True, "top_k": 50, "mode": "autoregressive"}


class Mortal(Complete):
    """Kills its own process in the third batch that any actor begins, once."""

    def __init__(self, folder: str, **options):
        super().__init__(**options)
        self.folder = Path(folder)

    def __call__(self, batch):
        (self.folder / f"{os.getpid()}-{time.time_ns()}").touch()
        if len(list(self.folder.glob("*-*"))) >= 3 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def main() -> int:
    seeds = [stagedspec.row_seed(0, index) for index in range(len(PROMPTS))]
    expected = [one.text for one in stagedspec.Decoder.default().complete_many(PROMPTS, seed=seeds, **OPTIONS)]
    ray.init(num_cpus=2, include_dashboard=False)
    rows = [
        {"index": index, "prompt": prompt, "seed": seed}
        for index, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True))
    ]
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for kind, more in ((Complete, {}), (Mortal, {"folder": folder})):
            begin = time.perf_counter()
            found = (
                ray.data.from_items(rows, override_num_blocks=12)
                .map_batches(
                    kind,
                    fn_constructor_kwargs={"seed_field": "seed", **OPTIONS, **more},
                    batch_size=4,
                    compute=ray.data.ActorPoolStrategy(size=2),  # Ray makes a dead actor anew, and repeats its task
                )
                .take_all()
            )
            texts = [row["text"] for row in sorted(found, key=lambda row: row["index"])]
            killed = (Path(folder) / "killed").exists()
            actors = {path.name.split("-")[0] for path in Path(folder).glob("*-*")}
            right = texts == expected and (kind is Complete or (killed and len(actors) > 2))
            same = same and right
            print(
                f"{kind.__name__}: {len(texts)} rows, {'all' if texts == expected else 'NOT all'} as in one process"
                + (f"; an actor was killed: {killed}, processes: {len(actors)}" if kind is Mortal else "")
                + f"; {time.perf_counter() - begin:.0f} s"
            )
    ray.shutdown()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
