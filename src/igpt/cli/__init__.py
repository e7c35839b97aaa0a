"""The command line: the table of commands and the function that runs them."""

import sys

from igpt.cli.run import Command, run_command

# By subject, in the order in which the help lists them.
COMMANDS = {
    "demo": Command("igpt.cli.demo:Demo", "run the whole pipeline on one data set, on a CPU"),
    "reproduce": Command(
        "igpt.cli.reproduce:Reproduce", "repeat the paper's experiments with your images"
    ),
    "prepare": Command("igpt.cli.data:Prepare", "convert images to a token data set"),
    "palette": Command(
        "igpt.cli.data:PaletteOptions", "fit a palette, or compute the error of a given one"
    ),
    "inspect": Command("igpt.cli.data:Inspect", "verify a token data set and show its contents"),
    "models": Command("igpt.cli.models:Models", "list the built-in models and the presets"),
    "plan": Command(
        "igpt.cli.training:PlanOptions", "predict memory and time of a pretraining run"
    ),
    "pretrain": Command(
        "igpt.cli.training:Pretrain", "train a model on tokens, mostly without labels"
    ),
    "finetune": Command("igpt.cli.training:Finetune", "fine-tune a model on labelled tokens"),
    "probe": Command(
        "igpt.cli.evaluation:Probe", "fit a linear classifier to the features of every layer"
    ),
    "score": Command(
        "igpt.cli.image_values:Score", "compute the likelihood of images in nats/pixel"
    ),
    "features": Command(
        "igpt.cli.image_values:Features", "write the features of images for other programs"
    ),
    "quality": Command(
        "igpt.cli.evaluation:Quality", "compare samples and completions with true images"
    ),
    "classify": Command("igpt.cli.evaluation:Classify", "print the most likely classes of images"),
    "sample": Command("igpt.cli.sampling:Sample", "generate images"),
    "complete": Command(
        "igpt.cli.sampling:Complete", "keep a part of images and generate the rest"
    ),
    "app": Command(
        "igpt.cli.sampling:App", "serve a web page that completes, scores and samples images"
    ),
    "report": Command("igpt.cli.sharing:Report", "write one page with all results of a run"),
    "card": Command("igpt.cli.sharing:Card", "write the model card of a run"),
    "push": Command(
        "igpt.cli.sharing:Push", "upload a model, its card, and its sample and completion grids"
    ),
    "import": Command(
        "igpt.cli.sharing:Import", "convert an OpenAI checkpoint to a model directory"
    ),
    "export": Command(
        "igpt.cli.sharing:Export", "write a model for ONNX Runtime, or with weights in bf16"
    ),
}
# Former commands, and how to do the same now.
RENAMED = {"evaluate": "igpt score MODEL NAME --published"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    return run_command(COMMANDS, sys.argv[1:] if arguments is None else arguments, RENAMED)
