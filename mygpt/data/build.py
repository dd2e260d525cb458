"""Builds the tokenizer that metadata describes, as in a checkpoint."""

from mygpt.data.bpe import BPETokenizer
from mygpt.data.tokenizer import ByteMetadata, ByteTokenizer, CharMetadata, CharTokenizer, Tokenizer, TokenizerMetadata


def tokenizer_from(metadata: TokenizerMetadata) -> Tokenizer:
    """The tokenizer that has this metadata.

    Raises:
        TokenizerError: it cannot be used, or a package that it needs is not installed.
    """
    if isinstance(metadata, CharMetadata):
        return CharTokenizer(metadata.vocab, end_of_text=metadata.end_of_text)
    if isinstance(metadata, ByteMetadata):
        return ByteTokenizer(end_of_text=metadata.end_of_text)
    return BPETokenizer(metadata.json_text, name="tokenizer")
