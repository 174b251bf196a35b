"""The audio formats that are read: the containers and decoders that FFmpeg may use, and files to refuse.

A container is listed if people have such files, if its demuxer opens nothing but the bytes that it is given,
and if a test reads such a file. So playlists, scripts and image sequences are not listed: each of them
names other files. A decoder is listed if a listed container carries it. Without the list of decoders, FFmpeg
would also run its decoders for pictures and video, only to describe the other streams of the file.

The demuxers of bare frames, such as mp3's, skip what comes before the first frame, because real files have
broken tags there. For the same reason they would find an mp3 inside an archive or a document. A file that
begins like an archive or a document is therefore refused by its first bytes.
"""

import av

CONTAINERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,loas,matroska,mov,mp3,mpeg,mpegts,ogg,tta,"
    "w64,wav,wv"
)
DECODERS = ",".join(
    [
        "aac,aac_latm,ac3,eac3,dca,alac,flac,ape,tta,wavpack,mp1,mp1float,mp2,mp2float,mp3,mp3float",
        "opus,libopus,vorbis,speex,amrnb,amrwb,libopencore_amrnb,libopencore_amrwb",
        "wmav1,wmav2,wmapro,wmalossless,adpcm_ima_wav,adpcm_ima_qt,adpcm_ms,adpcm_swf,adpcm_yamaha",
        "g722,g726,gsm_ms,dsd_lsbf,dsd_lsbf_planar,dsd_msbf,dsd_msbf_planar",
        *sorted(name for name in av.codecs_available if name.startswith("pcm_")),
    ]
)
HEAD_BYTES = 512
"""How many bytes of a file's beginning `not_audio` needs."""
_SIGNATURES = (  # offset, bytes there, what such a file is
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"PK\x07\x08", "a zip archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x1f\x8b\x08", "a gzip archive"),
    (0, b"BZh91AY&SY", "a bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"\x04\x22\x4d\x18", "an lz4 archive"),
    (0, b"MSCF\x00\x00\x00\x00", "a cab archive"),
    (0, b"!<arch>\n", "an ar archive"),
    (0, b"070701", "a cpio archive"),
    (0, b"070707", "a cpio archive"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"{\\rtf", "an RTF document"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft Office document"),
    (0, b"SQLite format 3\x00", "an SQLite database"),
    (0, b"\x7fELF", "a program"),
    (0, b"MThd\x00\x00\x00\x06", "a MIDI file, which holds notes and no sound"),
    (0, b"\x89PNG\r\n\x1a\n", "a picture"),
    (0, b"GIF8", "a picture"),
    (0, b"\xff\xd8\xff\xe0", "a picture"),
    (0, b"\xff\xd8\xff\xe1", "a picture"),
    (0, b"FWS", "a Flash file"),
    (0, b"CWS", "a Flash file"),
)


def not_audio(head: bytes) -> str | None:
    """Tells by its first bytes whether a file is an archive, a document or the like.

    Args:
        head: the first `HEAD_BYTES` of the file, or all of a shorter one.

    Returns:
        What the file is, with an article; None if it may be audio.
    """
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower()
    return "a web page" if text.startswith((b"<!doctype", b"<html")) else None
