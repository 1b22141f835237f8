"""The model card of some weights: what they are, how they were made, how good they are."""

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]


def model_card(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Write a model card in Markdown, with the header that the Hugging Face hub reads.

    Args:
        config: What ``config.json`` of the weights holds.
        facts: Any of ``title``, ``licence`` (an SPDX name or the hub's), ``data`` (what they were
            trained on, and its licence), ``recipe`` (the command), ``name`` (for from_pretrained)
            and ``report``, which ``lightning-mmd evaluate --output`` writes.

    Returns:
        The text of ``README.md``. What is not known is said to be not known.
    """
    name = facts.get("name", "FOLDER_OR_NAME")
    labelled = "LabelledLatents" in json.dumps(config["hyper_parameters"].get("latents"))
    header = [
        "---",
        "library_name: lightning-mmd",
        *([f"license: {facts['licence']}"] if "licence" in facts else []),
        *([] if labelled else ["pipeline_tag: unconditional-image-generation"]),
        "tags: [mmd-gan, gan, pytorch, lightning]",
        "---",
    ]
    parts = [
        f"# {facts.get('title', 'Weights of an MMD GAN')}",
        _use(name, labelled),
        "## Made by\n\n" + _recipe(config, facts),
        "## Scores\n\n" + _scores(facts.get("report")),
        "## Data and licence\n\n" + _licence(facts),
        "## Configuration\n\n```json\n"
        + json.dumps(config["hyper_parameters"], indent=1, sort_keys=True)
        + "\n```",
    ]
    return "\n".join(header) + "\n\n" + "\n\n".join(parts) + "\n"


def _use(name: str, labelled: bool) -> str:
    in_python, option = (", labels=3", " --labels 0,1,2") if labelled else ("", "")
    return (
        "```python\nfrom lightning_mmd import MMDGAN\n\n"
        f'model = MMDGAN.from_pretrained("{name}")\n'
        f"images = model.sample(64{in_python})\n```\n\n"
        f"or `lightning-mmd sample --pretrained {name}{option} --output samples.png`."
    )


def _recipe(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    recipe = f"`{facts['recipe']}`" if "recipe" in facts else "A command that was not recorded"
    kept = "averaged weights of the generator" if config["averaged"] else "the generator's weights"
    critic = "" if "critic" in config["parts"] else " The critic is not kept."
    return (
        f"{recipe}, lightning-mmd {config['version']}: {config['images_seen']} images seen in "
        f"{config['critic_step']} critic steps, by the rule\n\n```\n{config['rule']}\n```\n\n"
        f"The file holds {kept}, stored as {config['stored_as']}.{critic}"
    )


def _scores(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "Not measured. `lightning-mmd evaluate --pretrained ...` measures them."
    rows = [
        f"| {score} | {value:.4g} | {report['floors'][score]:.4g} |"
        for score, value in report["scores"].items()
    ]
    asked = report.get("asked_for")
    return (
        f"{report['num_samples']} samples against {report['num_real']} {report['split']} images of "
        f"{report['data']}, in features of {report['features']} (MMD^2: of the pixels). "
        "Beside each score, that of as many training images.\n\n"
        "| score | samples | real images |\n|---|---|---|\n"
        + "\n".join(rows)
        + (
            f"\n\nThe judge sees the class that was asked for in {asked:.1%} of the samples."
            if asked is not None
            else ""
        )
    )


def _licence(facts: Mapping[str, Any]) -> str:
    data = facts.get("data", "Trained on data that the card's author did not name.")
    licence = facts.get("licence")
    return data if licence is None else f"{data}\n\nThe weights are under {licence}."
