"""Networks that timm lacks, and pyramids that share their code."""
