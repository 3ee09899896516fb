"""A server of scores over HTTP, in the forms that trainers and data tools ask for."""
