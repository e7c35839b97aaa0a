"""Write a finished run as the built-in model photos-16: `package.py RUN TOKENS LABELLED`.

The weights are stored in bf16. All results of the card are those of the stored weights: the loss of
the test images and of `igpt.data.images.photographs`, the probe of every layer, samples and
completions. The probe is of LABELLED, a token data set with labels. They are computed in
`RUN-packaged`, a run with the records of RUN; what that folder already holds is not computed again.
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image

from igpt.builtin_models import CARD, DEFAULT_MODEL, WEIGHTS, folder_of
from igpt.cli import main as igpt
from igpt.data.images.photographs import photographs
from igpt.evaluation.results import score_file
from igpt.files import read_json, write_json

LARGEST = 12_000_000  # bytes of the weights
PHOTOGRAPHS = "scikit-learn-photographs"  # the name of these images in the card
TERMS = (
    "Tiny ImageNet consists of images of ImageNet, which its maintainers provide for "
    "non-commercial research and educational use only; the copyright of the images remains with "
    "their owners. Use this model, which was trained on them, for research and education only."
)
PICTURES = ("samples.png", "completions.png")


def run(*words: object) -> None:
    """Run a command of igpt; end this program if it fails."""
    print("$ igpt", *words, flush=True)
    if code := igpt([str(word) for word in words]):
        raise SystemExit(code)


def main(words: list[str] | None = None) -> None:
    """Compute the results that are missing, and replace the built-in model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of igpt pretrain")
    parser.add_argument("tokens", type=Path, help="its token data set")
    parser.add_argument("labelled", type=Path, help="a token data set with labels, to probe")
    parser.add_argument("--limit", default=10_000, help="test images to score and to probe")
    parser.add_argument("--fitted", default=20_000, help="images of a split to fit a probe to")
    options = parser.parse_args(words)
    out = options.run.with_name(options.run.name + "-packaged")
    out.mkdir(exist_ok=True)
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        shutil.copy(options.run / name, out)
    if not (out / "model").exists():
        run("export", options.run, "--bf16", out / "model")
    if (size := (out / "model" / WEIGHTS).stat().st_size) > LARGEST:
        raise SystemExit(f"the weights have {size:,} bytes; the package takes {LARGEST:,}")
    if not score_file(out, str(options.tokens), None).exists():
        run("score", out, options.tokens, "--limit", options.limit)
    folder = out / PHOTOGRAPHS
    folder.mkdir(exist_ok=True)
    for name, pixels in photographs().items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    if not (out / f"score-{PHOTOGRAPHS}.json").exists():
        run("score", out, folder.resolve())  # the card has the name of an absolute path only
    if not (out / "probe.json").exists():
        limits = ("--limit", options.fitted, "--test-images", options.limit)
        run("probe", out, options.labelled, *limits, "--knn", 20, "--precision", "bf16")
    if not (out / "samples.png").exists():
        run("sample", out, "--count", 32)
    if not (out / "completions.png").exists():
        # Not test images: the package must not contain images of ImageNet.
        run("complete", out, *sorted(folder.iterdir()))
    run("card", out, DEFAULT_MODEL, "--license", "other", "--terms", TERMS)
    target = folder_of(DEFAULT_MODEL)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(out / "model", target)
    for name in (CARD, "probe.json", *PICTURES):
        shutil.copy(out / name, target)
    probe = read_json(target / "probe.json", "probe")
    # The package has no paths of the machine that it was made on.
    names = {key: Path(probe[key]).name for key in ("source", "tokens")} | {"model": DEFAULT_MODEL}
    command = probe["environment"]["command"]
    command = command.replace(str(out), DEFAULT_MODEL).replace(probe["tokens"], names["tokens"])
    names["environment"] = probe["environment"] | {"command": command}
    write_json(target / "probe.json", probe | names)
    (target / WEIGHTS).chmod(0o644)  # safetensors makes its files private
    for file in sorted(target.iterdir()):
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
