{{- /* What packs a chart without following links leaves these folders out: Flux does, of a Git repository. */ -}}
{{- define "sennit.complete" -}}
{{- range list "base/meshes.yaml" "boot-guard/agent.yaml" "cleanup/cleanup.yaml" "federation/federate.yaml" "nodes/agent.yaml" "nodes/quota.yaml" -}}
{{- if not ($.Files.Get .) -}}
{{- fail (printf "the chart is not complete: %s is missing. Its folders are links to deploy/kubernetes: package it where they can be followed (helm package deploy/helm/sennit), and install that package" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* A workload of deploy/kubernetes with this release's image and settings. Arguments: root, file, settings */ -}}
{{- define "sennit.workload" -}}
{{- $root := .root -}}
{{- include "sennit.complete" $root -}}
{{- $values := $root.Values -}}
{{- $object := $root.Files.Get .file | fromYaml -}}
{{- $_ := set $object.metadata "namespace" $root.Release.Namespace -}}
{{- $_ := set $object.metadata.labels "app.kubernetes.io/instance" $root.Release.Name -}}
{{- $_ := set $object.metadata.labels "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $_ := set $object.metadata.labels "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") -}}
{{- $pod := $object.spec.template.spec -}}
{{- $container := first $pod.containers -}}
{{- with .settings.patch -}}
{{- $patch := ($root.Files.Get . | fromYaml).spec.template.spec -}}
{{- $_ := set $pod "initContainers" (concat $patch.initContainers ($pod.initContainers | default list)) -}}
{{- $_ := set $pod "volumes" (concat $pod.volumes $patch.volumes) -}}
{{- end -}}
{{- $tag := $values.image.tag | default ($root.Chart.AppVersion | replace "+" "-") -}}
{{- range concat $pod.containers ($pod.initContainers | default list) -}}
{{- $_ := set . "image" (printf "%s:%s" $values.image.repository $tag) -}}
{{- $_ := set . "imagePullPolicy" $values.image.pullPolicy -}}
{{- end -}}
{{- with $values.imagePullSecrets }}{{ $_ := set $pod "imagePullSecrets" . }}{{ end -}}
{{- with .settings.resources }}{{ $_ := set $container "resources" . }}{{ end -}}
{{- with .settings.replicas }}{{ $_ := set $object.spec "replicas" . }}{{ end -}}
{{- if eq $object.kind "DaemonSet" -}}
{{- $_ := set $pod "tolerations" $values.agent.tolerations -}}
{{- $_ := set $pod "nodeSelector" (merge (dict) $pod.nodeSelector $values.agent.nodeSelector) -}}
{{- end -}}
{{- if .settings.backend -}}
{{- range $container.env }}{{ if eq .name "SENNIT_BACKEND" }}{{ $_ := set . "value" $values.wireguard.backend }}{{ end }}{{ end -}}
{{- end -}}
{{- if and .settings.api $values.api.host -}}
{{- $host := dict "name" "KUBERNETES_SERVICE_HOST" "value" $values.api.host -}}
{{- $port := dict "name" "KUBERNETES_SERVICE_PORT" "value" ($values.api.port | toString) -}}
{{- range concat $pod.containers ($pod.initContainers | default list) -}}
{{- $_ := set . "env" (concat (.env | default list) (list $host $port)) -}}
{{- end -}}
{{- end -}}
{{- $own := .settings.own | default dict -}}
{{- with $own.affinity }}{{ $_ := set $pod "affinity" . }}{{ end -}}
{{- with $own.priorityClassName }}{{ $_ := set $pod "priorityClassName" . }}{{ end -}}
{{- with $own.updateStrategy }}{{ $_ := set $object.spec "updateStrategy" . }}{{ end -}}
{{- /* Never over those that select the pods. */ -}}
{{- with $own.labels -}}
{{- $_ := set $object.metadata "labels" (merge (dict) $object.metadata.labels .) -}}
{{- $_ := set $object.spec.template.metadata "labels" (merge (dict) $object.spec.template.metadata.labels .) -}}
{{- end -}}
{{- with $own.env }}{{ $_ := set $container "env" (concat ($container.env | default list) .) }}{{ end -}}
{{- with merge (dict) (.settings.annotations | default dict) ($own.annotations | default dict) }}{{ $_ := set $object.spec.template.metadata "annotations" . }}{{ end -}}
{{ toYaml $object }}
{{- end -}}

{{- define "sennit.configuration" -}}
{{- $kube := dict -}}
{{- with .Values.cluster }}{{ $_ := set $kube "cluster" . }}{{ end -}}
{{- if not (kindIs "invalid" .Values.oldSiteLabel) }}{{ $_ := set $kube "oldSiteLabel" .Values.oldSiteLabel }}{{ end -}}
{{- $wireguard := dict "externalDevice" true -}}
{{- range $key, $value := .Values.wireguard }}{{ if not (kindIs "invalid" $value) }}{{ $_ := set $wireguard $key $value }}{{ end }}{{ end -}}
{{- $own := dict "mesh" .Values.mesh "site" .Values.site "registry" (dict "kube" $kube) "wireguard" $wireguard -}}
{{- with .Values.sites }}{{ $_ := set $own "sites" . }}{{ end -}}
{{- with .Values.protectedAddresses }}{{ $_ := set $own "protectedAddresses" . }}{{ end -}}
{{ toYaml (mergeOverwrite $own .Values.config) }}
{{- end -}}
