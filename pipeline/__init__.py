"""From images to a registered model: one stream whose files stand in the order in which data passes them."""
