"""What other libraries need to call fastdl; each module here imports the library it is named after."""
