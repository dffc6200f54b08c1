"""The command line of the build."""

from tools.demo_model.build import main

main()
