# Installs into the Python package: <prefix> is the folder neuron_ext/, whose share/cmake goes on CMAKE_PREFIX_PATH.
include(CMakePackageConfigHelpers)
set(CMAKE_INSTALL_MESSAGE LAZY)
set(config_dir share/cmake/NeuronExt)

# In site-packages the torch package stands beside ours. An editable install has no torch beside it: there
# NEURON_EXT_TORCH_RPATH says where torch is.
set(NEURON_EXT_TORCH_RPATH "" CACHE PATH "Another folder where the installed library finds libtorch")
set_target_properties(
  neuron_ext PROPERTIES EXPORT_NAME library
                        INSTALL_RPATH "$ORIGIN;$ORIGIN/../../torch/lib;${NEURON_EXT_TORCH_RPATH}")

install(TARGETS neuron_ext EXPORT NeuronExtTargets LIBRARY DESTINATION lib)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/csrc/include/neuron_ext DESTINATION include)
install(EXPORT NeuronExtTargets NAMESPACE neuron_ext:: DESTINATION ${config_dir})

configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/NeuronExtConfig.cmake.in ${PROJECT_BINARY_DIR}/NeuronExtConfig.cmake
  INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/NeuronExtConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/NeuronExtConfig.cmake ${PROJECT_BINARY_DIR}/NeuronExtConfigVersion.cmake
        DESTINATION ${config_dir})
