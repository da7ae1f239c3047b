"""2024's problem 1 in the report: digits of MNIST-M and SVHN by one network."""

from dataset import DOMAIN_NAMES
from files import digest_of, load_checkpoint, read_jsonl
from plots import BLUE, ORANGE, image_grid, plt, save
from utils import UserError

import pandas as pd

from p1_ddpm.evaluate import Judge
from p1_ddpm.inference import SHIPPED_2024, domains_of
from p1_ddpm.model import load_model
from p1_ddpm.studies import FLAGS, means
from report.p1 import architecture, as_records, digits_of_same_noise, passes, quality, reverse_process


def losses(path, metrics, domains):
    """Draws each domain's loss on validation digits over the epochs, and the training loss of both together."""
    table = pd.DataFrame(metrics)
    figure, axes = plt.subplots(figsize=(4.5, 1.9))
    for domain, colour in zip(domains, (BLUE, ORANGE)):
        axes.plot(table.epoch, table[f"val_loss_{domain}"], color=colour, label=f"{DOMAIN_NAMES[domain]}, validation")
    axes.plot(table.epoch, table.loss, "k--", label="both, training")
    axes.set(xlabel="epoch", ylabel="mean squared error of v", yscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(path, figure)


def candidates(path, checkpoint, alphas_cumprod):
    """The settings of table domains in results.csv, measured with `checkpoint`: dicts of the flags, the passes through
    the network an image, and the means over the seeds in each domain, {domain: measures}; none where nothing is."""
    rows = pd.read_csv(path, dtype=dict.fromkeys(["checkpoint", *FLAGS], str))
    rows = rows[(rows.table == "domains") & (rows.checkpoint == digest_of(checkpoint))]
    found = {}
    for row in as_records(means(rows)):
        setting = {flag: row[flag] for flag in ("sampler", "steps", "spacing", "guidance", "interval")}
        own = found.setdefault(tuple(setting.values()), dict(setting, passes=passes(row, alphas_cumprod)))
        own[row["domain"]] = row
    return sorted(found.values(), key=lambda row: row["passes"])


def build(folder, checkpoints, data_dir, device, quick):
    """Draws the figures into `folder` and returns the numbers that p1_domains.typ shows.

    checkpoints: the folder of mnistm_svhn.pt, of its training's record mnistm_svhn.jsonl and of the studies'
    results.csv. quick: few images.
    """
    checkpoint, record = checkpoints / "mnistm_svhn.pt", checkpoints / "mnistm_svhn.jsonl"
    if not record.exists():
        raise UserError(f"there is no {record}; it is the metrics.jsonl of p1_ddpm/train.py --domains mnistm svhn")
    metrics = read_jsonl(record)
    model, alphas_cumprod = load_model(checkpoint, device)
    content, domains = load_checkpoint(checkpoint, "p1_ddpm", ["recipe", "config"]), domains_of(checkpoint)
    architecture(folder / "p1_domains_architecture.svg", model)
    grid, states = digits_of_same_noise(model, alphas_cumprod, device, SHIPPED_2024)
    for images, domain in zip(grid.split(100), domains):
        image_grid(folder / f"p1_domains_{domain}.svg", images, 10, row_names=range(10), column_names=range(1, 11),
                   width=3.6)
    firsts = {t: images[::100] for t, images in states.items()}  # of each domain the first 0
    shares = reverse_process(folder / "p1_domains_states.svg", firsts, alphas_cumprod,
                             [DOMAIN_NAMES[domain] for domain in domains])
    losses(folder / "p1_domains_losses.svg", metrics, domains)
    judges = {domain: Judge(data_dir, domain) for domain in domains}
    return dict(
        parameters=sum(p.numel() for p in model.parameters()), sampling=SHIPPED_2024._asdict(), shares=shares,
        schedule=content["config"]["schedule"], recipe=content["recipe"], record=metrics[-1],
        seconds=sum(row["seconds"] for row in metrics),
        candidates=candidates(checkpoints / "results.csv", checkpoint, alphas_cumprod),
        quality=quality(model, alphas_cumprod, judges, device, 3 if quick else 50, SHIPPED_2024))
