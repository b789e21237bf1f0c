"""diffuserve beside what people would use otherwise, under the same load in one run."""
