"""Problem 2's part of the report: eta, slerp and lerp, the number of steps, the course's ground truth."""

import torch

from p2_ddim.ddim import lerp, sample, slerp, stretch
from p2_ddim.evaluate import mean_squared_errors, read_images
from p2_ddim.inference import find_noises, load_noise, load_unet, place
from p2_ddim.studies import ALPHAS, ETAS, consistent, eta_grid, interpolation_strip, norm_table, steps_table
from report.figures import BLUE, VERMILION, image_grid, plt, save
from utils import UserError, load_torch


def detail(images):
    """Mean absolute difference of horizontal neighbours in grey levels, for each of uint8 `images` (N, 3, H, W)."""
    return images.float().diff(dim=3).abs().mean(dim=(1, 2, 3)).tolist()


def drift(grid, columns):
    """Root mean square distance in grey levels of each row of an eta grid from its first, over the columns."""
    rows = grid.float().reshape(-1, columns, *grid.shape[1:])
    return (rows - rows[0]).square().mean(dim=(1, 2, 3, 4)).sqrt().tolist()


def interpolation_figure(path, rows, details):
    """Norm of the interpolated noise, and detail of the face drawn from it, along slerp and lerp."""
    alphas, *norms = zip(*rows)
    figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.3))
    for ax, values, label in zip(axes, (norms, details), ("norm of the noise / √n", "detail of the face, grey levels")):
        for line, name, colour in zip(values, ("slerp", "lerp"), (BLUE, VERMILION)):
            ax.plot(alphas, line, "o-", color=colour, label=name)
        ax.set(xlabel="alpha", ylabel=label)
        ax.legend(fontsize=7)
    save(path, figure)


def steps_figure(path, rows):
    """Mean squared error against the images of 1,000 steps: rows (steps, error, error with eps of the clamped x0)."""
    steps, *errors = zip(*rows)
    figure, axes = plt.subplots(figsize=(3.2, 2.2))
    for line, name, colour in zip(errors, ("the network's eps", "eps of the clamped x0"), (BLUE, VERMILION)):
        axes.plot(steps, line, "o-", color=colour, label=name)
    axes.legend(fontsize=7)
    axes.set(xlabel="steps", ylabel="MSE to 1,000 steps", xscale="log", yscale="log")
    axes.set_xticks(steps, steps)
    axes.minorticks_off()
    save(path, figure)


def build(args, folder, device):
    """Draws the figures into `folder` and returns the numbers that p2.typ shows."""
    paths = find_noises(args.noise)
    if len(paths) < 4:
        raise UserError(f"{args.noise} holds {len(paths)} noise files; the figures need at least 4")
    noises = [load_noise(path).to(device) for path in paths]
    size, truths = noises[0].shape[-2:], read_images(args.gt) if args.gt else {}
    names = {f"{path.stem}.png" for path in paths}
    for name, truth in truths.items():  # before hours of sampling
        if name not in names or truth.shape[:2] != size:
            raise UserError(f"{args.gt / name} is no ground truth of a noise in {args.noise}: a noise of that name and of "
                            f"{truth.shape[0]}x{truth.shape[1]} pixels is wanted")
    model, config = place(load_unet(args.unet), device), load_torch(args.unet).get("config")
    steps, study = (4, dict(steps=(2, 3), reference=5)) if args.quick else (50, {})
    faces = torch.cat([stretch(sample(model, noise, steps)) for noise in noises]).cpu()
    image_grid(folder / "p2_faces.png", faces, len(faces), scale=1.2)
    grid = eta_grid(model, noises[:4], ETAS, steps).cpu()
    image_grid(folder / "p2_eta.png", grid, 4,
               row_names=[f"eta {eta}" for eta in ETAS], column_names=[path.stem for path in paths[:4]], scale=1.6)
    strips = [interpolation_strip(model, *noises[:2], way, steps=steps).cpu() for way in (slerp, lerp)]
    for name, strip in zip(("slerp", "lerp"), strips):
        image_grid(folder / f"p2_{name}.png", strip, len(strip), column_names=ALPHAS)
    norms, details = norm_table(*noises[:2]), [detail(strip) for strip in strips]
    interpolation_figure(folder / "p2_interpolation.png", norms, details)
    tables = [steps_table(network, torch.cat(noises[:4]), **study) for network in (model, consistent(model))]
    table = [(count, error, other) for (count, error), (_, other) in zip(*tables)]
    steps_figure(folder / "p2_steps.png", table)
    drawn = {f"{path.stem}.png": face.permute(1, 2, 0).double().numpy() for path, face in zip(paths, faces)}
    errors = mean_squared_errors(drawn, truths)
    for name, error in errors.items():
        print(f"{name}: MSE {error:.4f}")
    if errors:
        print(f"mean: MSE {sum(errors.values()) / len(errors):.4f}")
    return dict(
        course=config is None, parameters=sum(p.numel() for p in model.parameters()), size=noises[0].shape[-1],
        faces=len(faces), steps=steps, config=config or {}, norms=norms, details=details, etas=ETAS, drift=drift(grid, 4),
        steps_table=table, reference=study.get("reference", 1000), errors=errors)
