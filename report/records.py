"""The records of trainings and studies that the parts of the report are made from."""

from utils import UserError


def require_records(folder, makers):
    """UserError unless `folder` holds each file of `makers`, {name: the command that makes it}."""
    for name, maker in makers.items():
        if not (folder / name).exists():
            raise UserError(f"there is no {folder / name}; {maker} makes it")
