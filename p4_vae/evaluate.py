"""How well does the autoencoder of problem 1 reconstruct faces that it has not seen?

    python3 p4_vae/evaluate.py FACES               # mse = 0.0053 (1000 faces; KL 499.1 nats)

FACES is a folder or a zip file, as --data_dir in faces.py. Where it holds the faces 8001 to 9000, which no training
sees, these alone are taken. The mean squared error is over all pixels and channels in [0, 1], of the mean latent's
image; the assignment's training tip is less than 0.05.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import argument_parser, float_between, int_between, nonempty_path, pick_device, run

from faces import face_source, faces_to_test
from p4_vae.elbo import kl_divergence
from p4_vae.inference import reconstruct
from p4_vae.latents import encode_all
from p4_vae.model import CHECKPOINT, load_model


def evaluate(model, images, batch_size=250):
    """(MSE, KL in nats): means over uint8 images (N, 3, 64, 64)."""
    _, errors = reconstruct(model, images, batch_size=batch_size)
    return errors.mean().item(), kl_divergence(*encode_all(model, images, batch_size)).mean().item()


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("faces", type=face_source, metavar="FACES", help="folder or zip file of faces")
    parser.add_argument("--checkpoint", type=nonempty_path, default=CHECKPOINT, help="a training's model.pt or last.pt")
    parser.add_argument("--baseline", type=float_between(0), default=0.05, help="highest error that passes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=int_between(1), default=250, help="faces at a time")
    args = parser.parse_args()
    model, _ = load_model(args.checkpoint, pick_device(args.device))
    images = faces_to_test([args.faces]).images
    mse, kl = evaluate(model, images, args.batch_size)
    print(f"mse = {mse:.4f} ({len(images)} faces; KL {kl:.1f} nats)")
    sys.exit(0 if mse <= args.baseline else 1)


if __name__ == "__main__":
    run(main)
