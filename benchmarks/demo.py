"""`scripts/bench_demo`: measures what the demo model can do, from the sound that the service returns.

    scripts/bench_demo --json benchmarks/results/demo-8songs.json
    scripts/bench_demo --rows text melody --weights FOLDER
    scripts/bench_demo --recordings FOLDER          # more clips with melodies that it was not trained on
    scripts/bench_demo --picture benchmarks/results/demo-8songs.png

Rows that are in the JSON file already are not measured again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import soundfile
import soxr
import torch

from benchmarks.bounds import missed, parsed, refuse_unknown_rows
from benchmarks.report import machine
from training.evaluation import ROWS, SECONDS, Player, rendered, unseen
from training.scoring import FRAME, chroma, score_chroma
from training.synth import SAMPLE_RATE
from training.tunes import SONGS
from training.tunes import UNSEEN as UNSEEN_TUNES

UNSEEN = "unseen"


def main() -> int:
    """Runs the benchmark. Returns the exit status."""
    given = arguments()
    if given.picture:
        draw(Player(given.weights), given.picture)
        return 0
    found: dict[str, Any] = {}
    if given.json and given.json.exists():
        found = json.loads(given.json.read_text())
    missing = [row for row in given.rows if row not in found]
    if missing:
        player = Player(given.weights)
        for row in missing:
            started = time.perf_counter()
            figures = unseen(player, recordings(given.recordings)) if row == UNSEEN else ROWS[row](player)
            found[row] = figures | {"seconds": round(time.perf_counter() - started, 1)}
            print(row, json.dumps(found[row]), flush=True)
            found["machine"] = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            if given.json:
                given.json.write_text(json.dumps(found, indent=2) + "\n")
    for row in given.rows:
        print(f"{row:14}", json.dumps(found[row]))
    failed = [
        f"In row {row} {part}." for row in given.rows for part in missed(found[row], row, given.at_least, [])
    ]
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench_demo", description="Judges the demo model from its sound."
    )
    parser.add_argument("--json", type=Path, help="file for the results, written after each row")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, UNSEEN], default=[*ROWS, UNSEEN])
    parser.add_argument("--weights", type=Path, help="a checkpoint; without it, what the service finds")
    parser.add_argument("--picture", type=Path, help="only draw scores and what is played from them, as PNG")
    parser.add_argument("--recordings", type=Path, help="a folder of sound files to follow the melodies of")
    parser.add_argument(
        "--at-least", action="append", type=lambda text: parsed(text, ("song", "timbre")), default=[],
        metavar="FIGURE@ROW=VALUE", help="fail where fewer pieces have the right song or timbre",
    )  # fmt: skip
    given = parser.parse_args()
    refuse_unknown_rows(parser, given.at_least, given.rows)
    return given


def draw(player: Player, file: Path) -> None:
    """Draws the chroma of two scores beside that of the music generated from them.

    The first is generated from a prompt that names a song, the second follows a tune that was not trained.
    """
    from training.plots import plot_chroma

    song, tune = SONGS[0], UNSEEN_TUNES[0]
    said = f"{song.name} on a harp"
    clip = rendered(tune.notes, "piano", SECONDS)
    played = player.play(prompt=said, seed=1)
    followed = player.play(prompt="a music box", input_audio=player.clip(clip), seed=1)
    rows = {
        f"score: {song.name}": score_chroma(song.notes, len(chroma(played))),
        f'played from the prompt "{said}"': chroma(played),
        f"score: {tune.name}, sent as a piano clip; not among the eight": score_chroma(
            tune.notes, len(chroma(followed))
        ),
        'played from that clip and the prompt "a music box"': chroma(followed),
    }
    plot_chroma(rows, FRAME / SAMPLE_RATE, file)
    print(f"{file} is drawn")


def recordings(folder: Path | None) -> list[Any]:
    """Reads eight seconds of each file in a folder: mono at 32 kHz."""
    clips = []
    for file in sorted(folder.iterdir()) if folder else []:
        wav, rate = soundfile.read(file, always_2d=True)
        clips.append(soxr.resample(wav.mean(1), rate, SAMPLE_RATE)[: SECONDS * SAMPLE_RATE])
    return clips


if __name__ == "__main__":
    sys.exit(main())
