"""CLIP's towers: vision (`resnet`, `vit`), `text`, both (`clip`), and the nine published sizes (`zoo`)."""
