"""Array -> array functions that several lowerings may compute; they know no trees."""
