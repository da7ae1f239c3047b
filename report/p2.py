"""Problem 2's part of the report: eta, slerp and lerp, the number of steps, the course's ground truth."""

from files import load_torch, save_png
from plots import BLUE, TEXT_WIDTH, VERMILION, image_grid, plt, points_with_bars, save
from utils import UserError

import torch
from torchvision.utils import make_grid

from p2_ddim.ddim import lerp, sample, slerp, step_generators, stretch
from p2_ddim.evaluate import mean_squared_errors, read_folder
from p2_ddim.inference import find_noises, load_noise
from p2_ddim.model import load_model
from p2_ddim.studies import ALPHAS, ETAS, consistent, eta_grid, interpolation_strip, norm_table, steps_table


def detail(images):
    """Mean absolute difference of horizontal neighbours in grey levels, for each of uint8 `images` (N, 3, H, W)."""
    return images.float().diff(dim=3).abs().mean(dim=(1, 2, 3))


def detail_half_way(model, noises, faces, steps):
    """{where: [mean, standard deviation] of the faces' detail} over the pairs of noises 00-01, 02-03, and so on.

    ends: the faces of the noises themselves; slerp, lerp: those of half-way.
    """
    pairs = list(zip(noises[::2], noises[1::2]))
    ways = {path.__name__: torch.cat([stretch(sample(model, path(*pair, 0.5), steps)) for pair in pairs])
            for path in (slerp, lerp)}
    details = {name: detail(images) for name, images in dict(ways, ends=faces[:2 * len(pairs)]).items()}
    return {name: [values.mean().item(), values.std().item()] for name, values in details.items()}


def drift(grid, columns):
    """Root mean square distance in grey levels of each row of an eta grid from its first, over the columns."""
    rows = grid.float().reshape(-1, columns, *grid.shape[1:])
    return (rows - rows[0]).square().mean(dim=(1, 2, 3, 4)).sqrt().tolist()


def errors_of_steps(model, noises, **study):
    """(steps, mean, standard deviation) of steps_table's errors over the noises."""
    steps, errors = zip(*steps_table(model, noises, **study))
    errors = torch.stack(errors).cpu().numpy()
    return list(steps), errors.mean(axis=1), errors.std(axis=1, ddof=1)


def steps_figure(path, curves):
    """Mean squared error against the images of the most steps: {name: (steps, mean, standard deviation)}."""
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH * 0.75, 1.9))
    for (name, (steps, mean, std)), colour in zip(curves.items(), (BLUE, VERMILION)):
        points_with_bars(axes, steps, mean, std, color=colour, label=name)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xlabel="steps", ylabel="MSE to 1,000 steps", xscale="log", yscale="log")
    axes.set_xticks(steps, steps)
    axes.minorticks_off()
    save(path, figure)


def read_truths(folder, noise_paths, shape):
    """{name: ground truth} of the noises; UserError for one of no noise or of another shape (H, W)."""
    truths, names = read_folder(folder), {f"{path.stem}.png" for path in noise_paths}
    for name, truth in truths.items():
        if name not in names or truth.shape[:2] != shape:
            raise UserError(f"{folder / name} is no ground truth of these noises: a noise of that name and of "
                            f"{truth.shape[0]}x{truth.shape[1]} pixels is wanted")
    return truths


def build(folder, unet, noise_dir, truth_dir, device, quick):
    """Draws the figures into `folder` and returns the numbers that p2.typ shows.

    unet: the weights, the course's or those of train.py; noise_dir: the noises, at least 4; truth_dir: their ground
    truth, or None. quick: few steps.
    """
    paths = find_noises(noise_dir)
    if len(paths) < 4:
        raise UserError(f"{noise_dir} holds {len(paths)} noise files; the figures need at least 4")
    noises = [load_noise(path).to(device) for path in paths]
    truths = read_truths(truth_dir, paths, noises[0].shape[-2:]) if truth_dir else {}  # before hours of sampling
    model, content = load_model(unet, device), load_torch(unet)
    steps, alphas, study = (2, ALPHAS[::5], dict(steps=(1, 2), reference=3)) if quick else (50, ALPHAS, {})

    faces = torch.cat([stretch(sample(model, noise, steps)) for noise in noises]).cpu()
    image_grid(folder / "p2_faces.svg", faces, len(faces))
    by_ddpm = torch.cat([stretch(sample(model, noise, steps, 1, step_generators(0, [i]))).cpu()
                         for i, noise in enumerate(noises)])
    save_png(folder / "p2_strip.png", make_grid(by_ddpm, nrow=(len(faces) + 1) // 2, padding=1, pad_value=255))
    grid = eta_grid(model, noises[:4], ETAS, steps).cpu()
    by_noise = grid.reshape(len(ETAS), 4, *grid.shape[1:]).transpose(0, 1).flatten(0, 1)
    image_grid(folder / "p2_eta.svg", by_noise, len(ETAS), row_names=[path.stem for path in paths[:4]],
               column_names=[f"eta {eta}" for eta in ETAS], width=3.6)
    strips = [interpolation_strip(model, *noises[:2], way, alphas, steps) for way in (slerp, lerp)]
    image_grid(folder / "p2_interpolation.svg", torch.cat(strips).cpu(), len(alphas), row_names=("slerp", "lerp"),
               column_names=alphas)
    curves = {name: errors_of_steps(network, noises[:4], **study) for name, network in
              (("the network's eps", model), ("eps of the clamped x0", consistent(model)))}
    steps_figure(folder / "p2_steps.svg", curves)

    generated = {f"{path.stem}.png": face.permute(1, 2, 0).double().numpy() for path, face in zip(paths, faces)}
    errors = mean_squared_errors(generated, truths)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()), size=noises[0].shape[-1], faces=len(faces), steps=steps,
        course="config" not in content, config=content.get("config", {}), recipe=content.get("recipe", {}),
        norms=norm_table(*noises[:2]), detail=detail_half_way(model, noises, faces, steps), etas=ETAS,
        drift=drift(grid, 4), curves=[[*row] for row in zip(*(curve[1].tolist() for curve in curves.values()))],
        curve_steps=curves["the network's eps"][0], reference=study.get("reference", 1000), errors=errors)
