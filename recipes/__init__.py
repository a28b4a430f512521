"""Recipes: a corpus becomes a model, its error rates and files for devices, in stages that all recipes share."""

STAGES = (
    "download",
    "prepare",
    "features",
    "tokenizer",
    "train",
    "average",
    "decode",
    "score",
    "export",
    "verify",
    "report",
)
