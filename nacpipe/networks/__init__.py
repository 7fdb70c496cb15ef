"""Networks: how they are built, loaded and tapped. The layers below extraction that know torch."""
