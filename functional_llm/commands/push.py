"""`push`: uploads a directory or an adapter to the Hugging Face Hub."""

import argparse
from pathlib import Path

from functional_llm.commands.command import Command


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of uploading."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="that finetune, merge or convert has written")
    add("repository", metavar="ORG/NAME", help="of the Hub; made if it is not there")
    add("--private", action="store_true", default=None, help="only the account sees it, if made")
    add("--message", default="Upload with functional_llm", help="of the commit (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Uploads; says where to."""
    from functional_llm.formats.upload import push_folder

    address = push_folder(
        arguments.folder,
        arguments.repository,
        private=arguments.private,
        message=arguments.message,
    )
    print(f"Uploaded to {address}.")


COMMAND = Command(
    description="Uploads a directory or an adapter to the Hugging Face Hub, in one commit. The "
    "account is that of HF_TOKEN, or of `hf auth login`.",
    add_options=add_options,
    run=run,
)
