"""Where the images of mined regions are, for training, reports and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_base.images.roots import ImageRoot
from clip_base.runtime.errors import InputError, note
from clip_base.storage.files import existing
from clip_base.storage.remote import address_of
from clip_base.storage.spool import SpooledMember, TarSpool, is_gzipped
from clip_base.storage.tars import TAR, Member, addresses, names_tars
from regionclip.mining.shards import MANIFEST, MinedImage


class MinedImages:
    """Finds the images that were mined: where the user says, else where the manifest says, which is noted.

    Args:
        manifest: of the mined folder, with `images_folder` and `tars`.
        mined: the mined folder, for messages.
        images: the folder or tars of the images, as the user gave them; "": nothing.
        spool: folder for uncompressed copies of gzipped tars; None: these are refused.
        window: how many copies are kept.

    Raises:
        InputError: the folder or a tar is not there, or a tar has another size than when it was mined; those
            at addresses are not looked for.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        mined: str | Path,
        images: str = "",
        spool: Path | None = None,
        window: int = 16,
    ) -> None:
        sizes: dict[str, int] = manifest["tars"]
        self.root: ImageRoot | None = None
        self.tars: dict[str, Path] = {}
        self.gzipped: set[str] = set()
        self._spool = None if spool is None else TarSpool(spool, window)
        if sizes and images and not names_tars(images):
            raise InputError(f"images={images} must be the tars that were mined, such as {next(iter(sizes))}")
        moved = {Path(tar).name: Path(tar) for tar in addresses(images)} if sizes and images else {}
        try:
            for tar, size in sizes.items():
                path = self.tars[tar] = moved.get(Path(tar).name, Path(tar))
                if address_of(path) is not None:  # not asked for one by one
                    is_compressed = not str(path).lower().endswith(TAR)
                else:
                    if existing(path, "tar").stat().st_size != size:
                        raise InputError(f"tar {path} has another size than when it was mined; mine again")
                    is_compressed = is_gzipped(path)
                if is_compressed:
                    self.gzipped.add(tar)
            if not sizes:
                self.root = ImageRoot(images or manifest["images_folder"] or "/")
        except InputError as error:
            raise error if images else InputError(f"{error}; give images=") from None
        if not images:
            where = next(iter(sizes), manifest["images_folder"])
            more = f" and {len(sizes) - 1} more tars" if len(sizes) > 1 else ""
            named = f"{where}{more}, which {Path(mined) / MANIFEST} names"
            note(f"images are read from {named}; images= gives another place")

    def __call__(self, image: MinedImage) -> Path | Member | SpooledMember:
        """Returns where an image is; InputError when its name leads out of the folder."""
        if self.root is not None:
            return self.root.path(image.file_name, "the mined images")
        if image.tar not in self.tars or image.offset is None or image.size is None:
            raise InputError(f"image {image.file_name} is in no tar that the manifest names; mine again")
        if image.tar not in self.gzipped:
            return Member(self.tars[image.tar], image.offset, image.size)
        if self._spool is None:
            raise InputError(
                f"image {image.file_name} is in the compressed tar {image.tar}; unpack it with gunzip"
            )
        return SpooledMember(self._spool, self.tars[image.tar], image.offset, image.size)
